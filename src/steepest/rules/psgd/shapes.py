"""As which matrix a tensor is preconditioned, and which of its sides have dense factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["merged_shape", "sides_of"]


def merged_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The vector (n,) or matrix (m, n) as which a tensor is preconditioned.

    A tensor whose largest dimension is all of it is a vector; three or more dimensions become the most
    square matrix that a contiguous split makes, the first one among equals.

    >>> merged_shape((128, 64, 3, 3)), merged_shape((1, 7, 1)), merged_shape(())
    ((128, 576), (7,), (1,))
    """
    numel = math.prod(shape)
    if len(shape) < 2 or numel == max(shape):
        return (numel,)
    splits = [(math.prod(shape[:at]), math.prod(shape[at:])) for at in range(1, len(shape))]
    return min(splits, key=lambda split: max(split) / max(min(split), 1))


def sides_of(
    shape: Sequence[int], max_size_dense: float, max_skew_dense: float
) -> dict[str, tuple[int, ...]]:
    """The factors of a merged shape: (s, s) for a dense one, (s,) for a diagonal one; "" is a vector's.

    A side of size s is diagonal if s > ``max_size_dense`` or s² > ``max_skew_dense``·numel.

    >>> sides_of((128, 1024), 16384, 1.0)
    {'_left': (128, 128), '_right': (1024,)}
    >>> sides_of((5,), 16384, 1.0)
    {'': (5,)}
    """
    if len(shape) == 1:
        return {"": (shape[0],)}
    numel = math.prod(shape)
    dense = [size <= max_size_dense and size * size <= max_skew_dense * numel for size in shape]
    return {
        name: (size, size) if whole else (size,)
        for name, size, whole in zip(("_left", "_right"), shape, dense, strict=True)
    }
