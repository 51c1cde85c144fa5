"""Two elements in one integer of twice the width.

torch.compile's C++ has no vectors of 16-bit integers: a loop that meets one runs element by element, ten
times slower than memory. As pairs, int16 and float32 tensors become int32 and int64 ones, which it has.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["halves", "joined", "needs_pairs", "pairable", "paired"]

_WIDER = {torch.int16: torch.int32, torch.float32: torch.int64}


def needs_pairs(dtypes: Iterable[torch.dtype], device: torch.device) -> bool:
    """Whether compiled code for tensors of these dtypes is slow unless they are paired."""
    return device.type == "cpu" and torch.int16 in dtypes


def pairable(tensors: Iterable[Tensor]) -> bool:
    """Whether gapless tensors can be read in pairs: those of an odd size have an element too many.

    A slice that begins within a pair is not aligned for it.
    """
    return all(
        tensor.dtype in _WIDER and not tensor.numel() % 2 and not tensor.storage_offset() % 2
        for tensor in tensors
    )


def paired(tensor: Tensor) -> Tensor:
    """A view of a flat tensor [2n] that is :func:`pairable` as integers [n].

    >>> paired(torch.tensor([1, 2, 3, -1], dtype=torch.int16)).tolist()
    [131073, -65533]
    """
    return tensor.view(_WIDER[tensor.dtype])


def halves(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The elements of even and of odd place, [n] each: int32 with int16's values, or float32.

    >>> even, odd = halves(paired(torch.tensor([1, 2, 3, -1], dtype=torch.int16)))
    >>> even.tolist(), odd.tolist()
    ([1, 3], [2, -1])
    """
    if pairs.dtype == torch.int32:
        return (pairs << 16) >> 16, pairs >> 16
    return pairs.to(torch.int32).view(torch.float32), (pairs >> 32).to(torch.int32).view(torch.float32)


def joined(even: Tensor, odd: Tensor) -> Tensor:
    """What :func:`halves` took apart.

    >>> pairs = paired(torch.tensor([0.5, -2.0]))
    >>> torch.equal(joined(*halves(pairs)), pairs)
    True
    """
    if even.dtype == torch.int32:
        return (odd << 16) | (even & 0xFFFF)
    low, high = (half.view(torch.int32).to(torch.int64) for half in (even, odd))
    return (high << 32) | (low & 0xFFFFFFFF)
