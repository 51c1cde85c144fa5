"""Pairs of int16 (or float32) elements, viewed as one integer of twice the width.

Inductor's C++ has no vectors of 16-bit integers: a loop over an int16 tensor runs element by element, ten
times slower than memory. It does have vectors of int32 and int64, so a row that contains int16 state is
viewed in pairs: int16 as int32, float32 as int64.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["halves", "have_pairs", "joined", "needs_pairs", "pairable", "paired"]

_WIDER = {torch.int16: torch.int32, torch.float32: torch.int64}


def needs_pairs(dtypes: Iterable[torch.dtype], device: torch.device) -> bool:
    """Check whether compiled code for tensors of these dtypes is slow unless it reads them in pairs."""
    return device.type == "cpu" and torch.int16 in dtypes


def have_pairs(dtypes: Iterable[torch.dtype]) -> bool:
    """Check whether tensors of these dtypes can be viewed in pairs at all."""
    return all(dtype in _WIDER for dtype in dtypes)


def pairable(tensors: Iterable[Tensor]) -> bool:
    """Check whether contiguous tensors can be viewed in pairs.

    They need an even number of elements, and an even storage offset, or the view would not be aligned.
    """
    return all(
        tensor.dtype in _WIDER and not tensor.numel() % 2 and not tensor.storage_offset() % 2
        for tensor in tensors
    )


def paired(tensor: Tensor) -> Tensor:
    """View a flat :func:`pairable` tensor [2n] as integers [n].

    >>> paired(torch.tensor([1, 2, 3, -1], dtype=torch.int16)).tolist()
    [131073, -65533]
    """
    return tensor.view(_WIDER[tensor.dtype])


def halves(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Split pairs into the elements at even and at odd indices, [n] each: int16 values as int32, or float32.

    >>> even, odd = halves(paired(torch.tensor([1, 2, 3, -1], dtype=torch.int16)))
    >>> even.tolist(), odd.tolist()
    ([1, 3], [2, -1])
    """
    if pairs.dtype == torch.int32:
        return (pairs << 16) >> 16, pairs >> 16
    return pairs.to(torch.int32).view(torch.float32), (pairs >> 32).to(torch.int32).view(torch.float32)


def joined(even: Tensor, odd: Tensor) -> Tensor:
    """Join even and odd elements into pairs again, undoing :func:`halves`.

    >>> pairs = paired(torch.tensor([0.5, -2.0]))
    >>> torch.equal(joined(*halves(pairs)), pairs)
    True
    """
    if even.dtype == torch.int32:
        return (odd << 16) | (even & 0xFFFF)
    low, high = (half.view(torch.int32).to(torch.int64) for half in (even, odd))
    return (high << 32) | (low & 0xFFFFFFFF)
