"""Check the arguments of this package's functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["COMPUTING_DTYPES", "require_choice", "require_matrices", "require_shape"]

COMPUTING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_matrices(owner: str, x: Tensor, *, square: bool = False) -> None:
    """Raise unless ``x`` is a batch of (``square``) matrices of a dtype in :data:`COMPUTING_DTYPES`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner} needs a tensor, got {type(x).__name__}")
    if x.dtype not in COMPUTING_DTYPES:
        raise TypeError(f"{owner} needs float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"{owner} needs matrices [..., m, n], got a tensor of shape {tuple(x.shape)}")
    if square and x.shape[-2] != x.shape[-1]:
        raise ValueError(f"{owner} needs square matrices [..., n, n], got shape {tuple(x.shape)}")


def require_shape(owner: str, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless ``x``, the argument ``name`` of ``owner``, is a tensor of the given shape."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner} needs a tensor for {name}, got {type(x).__name__}")
    if x.shape != shape:
        raise ValueError(f"{owner} needs {name} of shape {tuple(shape)}, got {tuple(x.shape)}")


def require_choice(owner: str, name: str, value: object, choices: Sequence[object]) -> None:
    """Raise unless ``value``, the argument ``name`` of ``owner``, is one of ``choices``."""
    if value not in choices:
        known = [repr(choice) for choice in choices]
        allowed = " or ".join(known) if len(known) == 2 else f"one of {', '.join(known)}"
        raise ValueError(f"{owner}: {name} must be {allowed}, got {value!r}")
