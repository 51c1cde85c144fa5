"""What every function of this package asks of its matrices, and the errors for the others."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["COMPUTING_DTYPES", "require_matrices", "require_shape"]

COMPUTING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_matrices(owner: str, x: Tensor, *, square: bool = False) -> None:
    """Refuse what is not a batch of real floating point matrices.

    Args:
        owner: the function that asks, for the message.
        x: its operand.
        square: whether the last two dimensions must be equal.

    Raises:
        TypeError: ``x`` is no tensor, or of a dtype outside :data:`COMPUTING_DTYPES`.
        ValueError: ``x`` has fewer than two dimensions, or is not square where it must be.

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
    """Refuse an operand that does not fit the others.

    Args:
        owner: the function that asks, for the message.
        name: what it calls the operand.
        x: the operand.
        shape: the one shape that fits.

    Raises:
        TypeError: ``x`` is no tensor.
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
