"""Passes over large tensors, piece by piece, so that what is computed on the way stays small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steepest.compile.dynamic import run_dynamic

__all__ = ["MOVES_WEIGHTS", "all_finite", "flat_pieces", "in_pieces", "places", "row_blocks", "row_pieces"]

MOVES_WEIGHTS = "moves ternary weights"
"""What a pass does, for the warning that it is not compiled."""

# Elements of a piece: temporaries of that size stay in a processor's second-level cache.
_PIECE_ON_CPU = 1 << 18
_PIECE_ELSEWHERE = 1 << 26
# Elements of a block of dense weights or gradients. On a CPU it stays in the caches; where many rows of input
# meet it, it has as many rows, up to the second number, since products of thin matrices are slow. What has to
# be computed again if it is cut is not cut below the third.
_BLOCK_ON_CPU = 1 << 19
_THICK_BLOCK_ON_CPU = 1 << 20
_WHOLE_BLOCK_ON_CPU = 1 << 22
_BLOCK_ELSEWHERE = 1 << 26


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is infinite or NaN; a tensor without numbers has none.

    >>> all_finite(torch.tensor([1.0, 2.0])), all_finite(torch.tensor([1.0, float("nan")]))
    (True, False)
    """
    if tensor.is_meta or tensor.numel() == 0:
        return True
    # The two ends take no memory, where a mask takes a byte an element.
    low, high = torch.aminmax(tensor.detach())
    return bool(low.isfinite() & high.isfinite())


def row_blocks(
    rows: int, columns: int, device: torch.device, inputs: int = 0, whole: bool = False
) -> list[slice]:
    """Cut a matrix between rows into blocks that are made dense one at a time.

    Args:
        rows, columns: of the matrix.
        device: where it is.
        inputs: by how many rows of input the blocks are multiplied.
        whole: whether a cut costs another pass.

    >>> row_blocks(3000, 256, torch.device("cpu"))
    [slice(0, 2048, None), slice(2048, 3000, None)]
    """
    limit = _BLOCK_ELSEWHERE
    if device.type == "cpu":
        limit = min(max(_BLOCK_ON_CPU, inputs * columns), _THICK_BLOCK_ON_CPU)
        if whole and rows * columns <= _WHOLE_BLOCK_ON_CPU:
            limit = _WHOLE_BLOCK_ON_CPU
    return _slices(rows, max(1, limit // max(columns, 1)))


def row_pieces(rows: int, columns: int, device: torch.device, times: int = 1) -> list[slice]:
    """Cut a matrix between rows into pieces for passes over memory; ``times`` as large on a CPU."""
    limit = times * _PIECE_ON_CPU if device.type == "cpu" else _PIECE_ELSEWHERE
    return _slices(rows, max(1, limit // max(columns, 1)))


def flat_pieces(count: int, device: torch.device, times: int = 1) -> list[slice]:
    """Cut so many elements into pieces for passes over memory; ``times`` as large on a CPU."""
    return _slices(count, times * _PIECE_ON_CPU if device.type == "cpu" else _PIECE_ELSEWHERE)


def in_pieces(
    function: Callable[..., None],
    tensors: tuple[Tensor, ...],
    start: int,
    arguments: tuple[Any, ...],
    *,
    compiled: bool,
) -> None:
    """Call ``function(pieces, first, *arguments)`` for pieces of contiguous tensors of one shape.

    Args:
        function: elementwise; writes into the pieces it is given.
        tensors: contiguous, of one shape.
        start: the first element's index in the whole layer; ``first`` is that of the piece's, a number or a
            0-dim tensor.
        arguments: passed on.
        compiled: in one graph of its own, the same for all sizes.
    """
    flat = [tensor.view(-1) for tensor in tensors]
    device = flat[0].device
    for part in flat_pieces(flat[0].numel(), device):
        cut = tuple(tensor[part] for tensor in flat)
        # torch makes graphs of their own for a size of 1, and for the number 0.
        if compiled and part.stop - part.start > 1:
            at = torch.tensor(start + part.start, device=device)
            key = (function, device, *(tensor.dtype for tensor in cut))
            run_dynamic(key, function, (cut, at, *arguments), MOVES_WEIGHTS)
        else:
            function(cut, start + part.start, *arguments)


def places(like: Tensor, first: int | Tensor) -> Tensor:
    """The int64 indices of a piece's elements."""
    return torch.arange(like.numel(), device=like.device) + first


def _slices(count: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]
