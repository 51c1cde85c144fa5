"""Zeros to trace graphs over words of ternary weights with."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["trial_planes", "trial_words"]

# No two sizes alike, and large, so that loops are made for several threads.
_ROWS, _PLANES, _WORDS = 264, 4, 520


def trial_words(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Packed weights: [rows, words], of sizes that stand for all."""
    return _any_size(torch.zeros(_ROWS, _WORDS, dtype=dtype, device=device))


def trial_planes(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The planes of a tensor [rows, planes, words]."""
    made = torch.zeros(_ROWS, _PLANES, _WORDS, dtype=dtype, device=device)
    return [_any_size(plane) for plane in made.unbind(1)]


def _any_size(tensor: Tensor) -> Tensor:
    for dim in range(tensor.dim()):
        torch._dynamo.mark_dynamic(tensor, dim)
    return tensor
