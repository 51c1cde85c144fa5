"""Check the arguments of this package's functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["COMPUTING_DTYPES", "require_choice", "require_matrices", "require_shape"]

COMPUTING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_matrices(owner: str, x: Tensor, *, square: bool = False) -> None:
    """Raise unless ``x`` is a batch of real floating-point matrices.

    Args:
        owner: name of the calling function, for the message.
        x: its operand.
        square: also require the last two dimensions to be equal.

    Raises:
        TypeError: ``x`` is not a tensor, or its dtype is not in :data:`COMPUTING_DTYPES`.
        ValueError: ``x`` has fewer than two dimensions, or is not square although ``square`` is set.

    >>> require_matrices("orthogonalize", torch.ones(3))
    Traceback (most recent call last):
        ...
    ValueError: orthogonalize needs matrices [..., m, n], got a tensor of shape (3,)
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner} needs a tensor, got {type(x).__name__}")
    if x.dtype not in COMPUTING_DTYPES:
        raise TypeError(f"{owner} needs float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"{owner} needs matrices [..., m, n], got a tensor of shape {tuple(x.shape)}")
    if square and x.shape[-2] != x.shape[-1]:
        raise ValueError(f"{owner} needs square matrices [..., n, n], got shape {tuple(x.shape)}")


def require_shape(owner: str, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless ``x`` is a tensor of the given shape.

    Args:
        owner: name of the calling function, for the message.
        name: name of its argument, for the message.
        x: the argument.
        shape: the required shape.

    Raises:
        TypeError: ``x`` is not a tensor.
        ValueError: ``x`` has another shape.

    >>> require_shape("symmetric_product", "y", torch.ones(3, 4), (4, 3))
    Traceback (most recent call last):
        ...
    ValueError: symmetric_product needs y of shape (4, 3), got (3, 4)
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner} needs a tensor for {name}, got {type(x).__name__}")
    if x.shape != shape:
        raise ValueError(f"{owner} needs {name} of shape {tuple(shape)}, got {tuple(x.shape)}")


def require_choice(owner: str, name: str, value: object, choices: Sequence[object]) -> None:
    """Raise unless ``value`` is one of ``choices``.

    Args:
        owner: name of the calling function, for the message.
        name: name of its argument, for the message.
        value: the argument.
        choices: the allowed values.

    Raises:
        ValueError: ``value`` is not among them.

    >>> require_choice("spectral_norm_bound", "kind", "sym", ("spd", "skew"))
    Traceback (most recent call last):
        ...
    ValueError: spectral_norm_bound: kind must be 'spd' or 'skew', got 'sym'
    """
    if value not in choices:
        known = [repr(choice) for choice in choices]
        allowed = " or ".join(known) if len(known) == 2 else f"one of {', '.join(known)}"
        raise ValueError(f"{owner}: {name} must be {allowed}, got {value!r}")
