"""Which tensors are coded: the table of the format, and what must hold for every shape."""

import itertools
import math

import pytest

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


def check_choice(block_size):
    """The largest block of which a row is a multiple, in matrices of at least 4,096 elements alone."""
    sizes = (0, 1, 2, 3, 16, 31, 32, 48, 64, 65, 96, 1000)
    for shape in (shape for dims in range(4) for shape in itertools.product(sizes, repeat=dims)):
        block, numel = block_size(shape), math.prod(shape)
        if len(shape) < 2 or numel < 4096:
            assert block is None
            continue
        fits = [size for size in (64, 32) if numel // shape[0] % size == 0]
        assert block == (max(fits) if fits else None)
        if block:
            assert math.prod(scale_shape(shape, block)) * block == numel


def test_blocks_lie_within_rows_and_the_largest_that_fits_is_taken():
    check_choice(block_size)
    with pytest.raises(AssertionError):  # blocks across rows
        check_choice(lambda shape: 64 if len(shape) > 1 and math.prod(shape) >= 4096 else None)


@pytest.mark.parametrize(("shape", "block"), [((4, 96), 64), ((4096,), 64), ((2, 2, 31), 32)])
def test_no_scales_without_whole_blocks(shape, block):
    with pytest.raises(ValueError, match="no rows of whole blocks"):
        scale_shape(shape, block)
