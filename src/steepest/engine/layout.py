"""Tensors of one shape as one dimension."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["flat"]


def flat(tensors: Sequence[Tensor], *, ordered: bool) -> list[Tensor] | None:
    """One-dimensional views of tensors that lie in memory alike, without gaps; None if they do not.

    Elements come in the order of memory; with ``ordered`` that must be the logical one.

    >>> import torch
    >>> matrix = torch.arange(6).view(2, 3)
    >>> flat([matrix.t(), matrix.t()], ordered=False)[0].tolist()
    [0, 1, 2, 3, 4, 5]
    >>> flat([matrix, torch.arange(6).view(3, 2).t()], ordered=False) is None
    True
    """
    if not all(map(Tensor.is_contiguous, tensors)):
        if ordered:
            return None
        strides = tensors[0].stride()
        outward = sorted(range(len(strides)), key=lambda dim: -strides[dim])
        tensors = [tensor.permute(outward) for tensor in tensors]
        if not all(map(Tensor.is_contiguous, tensors)):
            return None
    return [tensor if tensor.dim() == 1 else tensor.view(-1) for tensor in tensors]
