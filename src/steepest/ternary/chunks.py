"""Cut passes over large tensors into chunks, so that temporaries stay small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steepest.compile.dynamic import run_dynamic

__all__ = ["LARGE", "MOVES_WEIGHTS", "all_finite", "are_finite", "in_chunks", "row_blocks", "row_chunks"]

MOVES_WEIGHTS = "moves ternary weights"  # the task of a pass, for the warning that it is not compiled
LARGE = 4  # how many times as large chunks may be where few calls are made for each

# Elements of a chunk: temporaries of this size stay in a CPU's second-level cache.
_CHUNK_ON_CPU = 1 << 18
# Elements of a block of dense weights or gradients. On a CPU a block stays in the caches; where it meets many
# rows of input it has as many rows itself, up to the second limit, since products of thin matrices are slow.
# Where a cut means computing something twice (``whole``), layers below the third limit are not cut.
_BLOCK_ON_CPU = 1 << 19
_THICK_BLOCK_ON_CPU = 1 << 20
_WHOLE_BLOCK_ON_CPU = 1 << 22
_ELSEWHERE = 1 << 26


def are_finite(tensor: Tensor) -> Tensor:
    """Tell whether no element is infinite or NaN, 0-dim bool."""
    # Minimum and maximum need no memory; a mask takes a byte an element.
    low, high = torch.aminmax(tensor)
    # ∞ − ∞ is NaN, which equals nothing.
    return (low - low) == (high - high)


def all_finite(tensor: Tensor) -> bool:
    """Tell whether no element is infinite or NaN; True for tensors on the meta device."""
    return tensor.is_meta or tensor.numel() == 0 or bool(are_finite(tensor.detach()))


def row_blocks(
    rows: int, columns: int, device: torch.device, inputs: int = 0, whole: bool = False
) -> list[slice]:
    """Cut a matrix, which meets ``inputs`` rows of input, into blocks of rows to make dense one at a time."""
    limit = _ELSEWHERE
    if device.type == "cpu":
        limit = min(max(_BLOCK_ON_CPU, inputs * columns), _THICK_BLOCK_ON_CPU)
        if whole and rows * columns <= _WHOLE_BLOCK_ON_CPU:
            limit = _WHOLE_BLOCK_ON_CPU
    return _slices(rows, columns, limit)


def row_chunks(rows: int, columns: int, device: torch.device, times: int = 1) -> list[slice]:
    """Cut a matrix into chunks of rows, ``times`` as large as usual on a CPU."""
    return _slices(rows, columns, times * _CHUNK_ON_CPU if device.type == "cpu" else _ELSEWHERE)


def in_chunks(
    function: Callable[..., None],
    tensors: tuple[Tensor, ...],
    start: int,
    arguments: tuple[Any, ...],
    *,
    compiled: bool,
) -> None:
    """Call ``function(chunks, first, *arguments)`` for every chunk of contiguous tensors of one shape.

    The function is elementwise and writes into the chunks; ``first`` is the index of a chunk's first element
    in the layer, a number or a 0-dim tensor, where ``start`` is that of the tensors'. ``compiled``: run a
    compiled graph, the same one for all sizes.
    """
    flat = [tensor.view(-1) for tensor in tensors]
    device = flat[0].device
    for part in row_chunks(flat[0].numel(), 1, device):
        chunk = tuple(tensor[part] for tensor in flat)
        # torch.compile specializes on the size 1 and on the number 0.
        if compiled and part.stop - part.start > 1:
            first = torch.tensor(start + part.start, device=device)
            key = (function, device, *(tensor.dtype for tensor in chunk))
            run_dynamic(key, function, (chunk, first, *arguments), MOVES_WEIGHTS)
        else:
            function(chunk, start + part.start, *arguments)


def _slices(rows: int, columns: int, limit: int) -> list[slice]:
    size = max(1, limit // max(columns, 1))
    return [slice(at, min(at + size, rows)) for at in range(0, rows, size)]
