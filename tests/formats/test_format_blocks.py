"""Which tensors are coded: the table of the format, and what must hold for every shape."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steepest.formats.blocks import block_size, scale_shape

TABLE = {
    (128, 128): 64,
    (64, 64): 64,
    (4096, 1): None,
    (63, 64): None,  # 4,032 elements
    (64, 3, 7, 32): 32,
    (43, 96): 32,
    (1000, 147): None,
    (128, 48): None,
    (8192,): None,
    (): None,
    (0, 64): None,
    (4096, 0): None,
    (1, 4096): 64,
}


@pytest.mark.parametrize("shape", TABLE)
def test_table(shape):
    assert block_size(shape) == TABLE[shape]


@given(st.lists(st.integers(0, 200), max_size=4))
def test_blocks_lie_within_rows_and_the_largest_that_fits_is_taken(shape):
    block, numel = block_size(shape), math.prod(shape)
    if len(shape) < 2 or numel < 4096:
        assert block is None
        return
    fits = [size for size in (64, 32) if numel // shape[0] % size == 0]
    assert block == (max(fits) if fits else None)
    if block:
        assert math.prod(scale_shape(shape, block)) * block == numel


@pytest.mark.parametrize(("shape", "block"), [((4, 96), 64), ((4096,), 64), ((2, 2, 31), 32)])
def test_no_scales_without_whole_blocks(shape, block):
    with pytest.raises(ValueError, match="no rows of whole blocks"):
        scale_shape(shape, block)
