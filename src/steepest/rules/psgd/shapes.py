"""Which sides of a matrix have dense factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["sides_of"]


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
