"""Which tensors are coded, and in blocks of how many elements."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["BLOCKS", "block_size", "scale_shape"]

BLOCKS = (64, 32)

# Below this, scales and calls cost more than the codes save.
_FEWEST = 4096


def block_size(shape: Sequence[int]) -> int | None:
    """Return how many elements of a parameter share a scale: 64, 32, or None where it is not coded.

    A block lies within one row, of numel / shape[0] elements. Coded are tensors of two or more dimensions and
    at least 4,096 elements, whose rows are a multiple of 64 or else of 32.

    Args:
        shape: the logical tensor's, never a shard's: the state's format must not depend on the world size.

    >>> [block_size(shape) for shape in [(128, 128), (64, 3, 7, 32), (1000, 147), (128, 16), (8192,)]]
    [64, 32, None, None, None]
    """
    numel = math.prod(shape)
    if len(shape) < 2 or numel < _FEWEST:
        return None
    row = numel // shape[0]
    return next((block for block in BLOCKS if row % block == 0), None)


def scale_shape(shape: Sequence[int], block: int) -> tuple[int, int]:
    """Return the shape of the scales beside codes of this shape: [shape[0], row / block].

    Args:
        shape: of the codes: the logical tensor's, or that of a shard that holds whole blocks.
        block: elements that share a scale.

    Raises:
        ValueError: the rows are not a multiple of ``block``.

    >>> scale_shape((128, 3, 64), 64)
    (128, 3)
    """
    row = math.prod(shape[1:])
    if len(shape) < 2 or row % block:
        raise ValueError(f"a tensor of shape {list(shape)} has no rows of whole blocks of {block}")
    return shape[0], row // block
