"""Conversions on loading, beside loops over rows and the formats themselves."""

import pytest
import torch

from steepest.formats.int8 import encode_nonnegative, encode_signed
from steepest.formats.load import convert_correction, decode, encode, reblock
from steepest.formats.master import join, part

INT8, INT16 = torch.int8, torch.int16


def tensor(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape, generator=generator))


LAYOUTS = {
    "contiguous": lambda: tensor(6, 192),
    "transposed": lambda: tensor(192, 6).t(),
    "cut": lambda: tensor(6, 400)[:, 8:200],
    "expanded": lambda: tensor(6, 1).expand(6, 192),
    "channels last": lambda: tensor(6, 16, 3, 4).contiguous(memory_format=torch.channels_last),
}


def check_rows(encode, layout, nonnegative):
    """Every block of a row is encoded on its own, in the logical order."""
    x = LAYOUTS[layout]()
    x = x.abs() if nonnegative else x
    codes, scale = encode(x, 64, nonnegative=nonnegative)
    assert codes.shape == x.shape
    assert scale.shape == (6, 3)
    assert codes.is_contiguous()
    assert scale.is_contiguous()
    for at in range(6):
        row = x[at].flatten()
        for block in range(3):
            part = row[64 * block : 64 * (block + 1)].contiguous()
            one = encode_nonnegative(part, None) if nonnegative else encode_signed(part)
            assert torch.equal(codes[at].flatten()[64 * block : 64 * (block + 1)], one[0])
            assert torch.equal(scale[at, block], one[1])


def in_memory_order(value, block, *, nonnegative):
    strided = value.as_strided((value.numel(),), (1,)) if value.stride(-1) else value.flatten()
    codes, scale = encode(strided.reshape(6, 192), block, nonnegative=nonnegative)
    return codes.view(value.shape), scale


def fails(check, *args):
    with pytest.raises(AssertionError):
        check(*args)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("nonnegative", [False, True])
def test_any_layout(layout, nonnegative):
    check_rows(encode, layout, nonnegative)


def test_the_layouts_refuse_the_order_of_memory():
    fails(check_rows, in_memory_order, "transposed", False)
    fails(check_rows, in_memory_order, "channels last", False)


def check_shards(encode):
    """Rows do not know of one another: any cut along the first dimension gives the same codes."""
    x = torch.cat([tensor(6, 96), 1e6 * tensor(1, 96, seed=1), tensor(6, 96, seed=2)])
    codes, scale = encode(x)
    for cut in (1, 5, 7, 12):
        for one, whole in zip(
            map(torch.cat, zip(encode(x[:cut]), encode(x[cut:]), strict=True)), (codes, scale), strict=True
        ):
            assert torch.equal(one, whole)


def test_row_shards_are_encoded_alike():
    check_shards(lambda x: encode(x, 32, nonnegative=False))
    check_shards(lambda x: encode(x.abs(), 32, nonnegative=True))

    def across_rows(x):
        flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % 64))
        codes, scale = encode(flat.view(-1, 64), 64, nonnegative=False)
        return codes.flatten()[: x.numel()].view(x.shape), scale

    fails(check_shards, across_rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_floating_dtype(dtype):
    x = tensor(8, 64).to(dtype)
    for one, other in zip(
        encode(x, 32, nonnegative=False), encode(x.float(), 32, nonnegative=False), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize(("old", "new"), [(32, 64), (64, 32)])
def test_other_blocks(nonnegative, old, new):
    x = tensor(8, 2, 64)
    x = x.abs() if nonnegative else x
    codes, scale = encode(x, old, nonnegative=nonnegative)
    read = decode(codes, scale)
    assert read.shape == x.shape
    for got, expected in zip(
        reblock(codes, scale, new), encode(read, new, nonnegative=nonnegative), strict=True
    ):
        assert torch.equal(got, expected)
    same = reblock(codes, scale, old)
    assert torch.equal(same[0], codes)
    assert torch.equal(same[1], scale)
    # Where a whole row is of one size, nothing is lost either way.
    even = encode(torch.ones(4, 128), old, nonnegative=nonnegative)
    assert torch.equal(decode(*reblock(*even, new)), torch.ones(4, 128))


def test_a_shard_without_rows():
    codes, scale = encode(torch.empty(0, 128), 64, nonnegative=False)
    assert codes.shape == (0, 128)
    assert scale.shape == (0, 2)
    assert decode(codes, scale).shape == (0, 128)
    assert reblock(codes, scale, 32)[1].shape == (0, 4)


def test_loaded_second_moments_have_no_zero_but_zero():
    v = torch.cat([torch.zeros(1), torch.logspace(-30, 0, 63)]).expand(64, 64)
    codes, _ = encode(v, 64, nonnegative=True)
    assert torch.equal(codes == 0, v == 0)


@pytest.mark.parametrize(
    ("codes", "scale"),
    [
        (torch.zeros(4, 64, dtype=INT16), torch.zeros(4, 1)),
        (torch.zeros(4, 64, dtype=INT8), torch.zeros(4, 1, dtype=torch.float16)),
        (torch.zeros(4, 64, dtype=INT8), torch.zeros(4)),
        (torch.zeros(4, 64, dtype=INT8), torch.zeros(5, 1)),
        (torch.zeros(4, 64, dtype=INT8), torch.zeros(4, 4)),
        (torch.zeros(4, 96, dtype=INT8), torch.zeros(4, 2)),
        (torch.zeros(4, 64, dtype=INT8), torch.zeros(4, 0)),
        (torch.zeros(64, dtype=INT8), torch.zeros(1, 1)),
    ],
)
def test_codes_that_are_none(codes, scale):
    with pytest.raises(ValueError, match=r"scales|codes|rows"):
        decode(codes, scale)
    with pytest.raises(ValueError, match=r"scales|codes|rows"):
        reblock(codes, scale, 32)


def test_values_that_cannot_be_encoded():
    with pytest.raises(ValueError, match="not floating-point"):
        encode(torch.zeros(64, 64, dtype=torch.int32), 64, nonnegative=False)
    with pytest.raises(ValueError, match="whole blocks"):
        encode(torch.zeros(64, 96), 64, nonnegative=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_corrections_of_another_width(dtype):
    x = tensor(200, 50).t() * 1e-3
    param, narrow = part(x, dtype, INT8)
    _, wide = part(x, dtype, INT16)
    widened = convert_correction(narrow, param, INT16)
    assert torch.equal(join(param, widened), join(param, narrow))
    narrowed = convert_correction(wide, param, INT8)
    param_of_wide, _ = part(x, dtype, INT16)
    # As from the float32 value, except where that would round the parameter up.
    same = (param == param_of_wide) & (narrowed != 127)
    assert torch.equal(narrowed[same], narrow[same])
    assert float(same.float().mean()) > 0.98
    bound = {torch.bfloat16: 2.0**-15, torch.float16: 2.0**-18}[dtype]
    error = (join(param_of_wide, narrowed) - x).abs()
    assert (error <= (bound * x.abs()).clamp(min=2.0**-32)).all()
    for new, width in ((widened, INT16), (narrowed, INT8), (convert_correction(None, param, INT8), INT8)):
        assert new.dtype == width
        assert new.stride() == param.stride()
    assert not convert_correction(None, param, INT16).any()
    assert torch.equal(convert_correction(narrow, param, INT8), narrow)


def test_the_largest_corrections_do_not_wrap():
    param = torch.ones(4, dtype=torch.bfloat16)
    ends = torch.tensor([-32768, 32767, 32640, 32639], dtype=INT16)
    assert convert_correction(ends, param, INT8).tolist() == [-128, 127, 127, 127]


def test_corrections_that_are_none():
    param = torch.ones(4, dtype=torch.bfloat16)
    for wrong in (torch.zeros(3, dtype=INT8), torch.zeros(4)):
        with pytest.raises(ValueError, match="correction"):
            convert_correction(wrong, param, INT8)
