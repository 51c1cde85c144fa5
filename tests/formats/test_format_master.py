"""Master weights in 24 and 32 bits: every bit pattern that matters, and variants that must fail."""

import math

import pytest
import torch

from steepest.formats.master import CORRECTIONS, dropped_bits, join, part
from steepest.random import bits32, derive_key

BF16, FP16 = torch.bfloat16, torch.float16
INT8, INT16 = torch.int8, torch.int16
DTYPES, WIDTHS = [BF16, FP16], list(CORRECTIONS.values())
HALVES = torch.arange(65536)


def floats(bits):
    """float32 of int64 bit patterns in [0, 2**32)."""
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def low_halves():
    """All 2¹⁶ low halves with 16 exponents from 2⁻¹²⁶ to the largest, both signs among them."""
    exponents = torch.tensor([1, 2, 3, 17, 33, 64, 90, 100, 112, 113, 126, 127, 128, 142, 200, 253])
    signs = torch.arange(16) % 2 << 31
    return floats(((exponents << 23 | signs | 0x2A0000)[:, None] | HALVES).view(-1))


def high_halves():
    """All 2¹⁶ high halves, so every exponent, NaN, infinities and subnormals, with 11 low halves."""
    low = torch.tensor([0, 1, 0x7F, 0x80, 0x81, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return floats(((HALVES << 16)[:, None] | low).view(-1))


VALUES = torch.cat([low_halves(), high_halves()])


def noise(x, step=0):
    return bits32(derive_key(0, 0, step), torch.arange(x.numel()).view(x.shape))


def reached(x, dtype, width=INT16):
    """The finite values that the dtype does not round to infinity, ties going away from zero."""
    limit = {BF16: 2.0**128 - 2.0**119, FP16: 65520.0}[dtype]
    return x.abs().double() < limit * (1 - 2.0**-16 * (width == INT8))


def same(a, b):
    """Bit for bit, except that any NaN is as good as another."""
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())


def nearest_even(value, dtype, width, noise=None):
    """The parameter's ties go to even, so that corrections of half a unit have either sign and overflow."""
    cut = dropped_bits(dtype, width)
    bits = value.view(torch.int32)
    if cut:
        bits = (bits + (1 << (cut - 1))) & -(1 << cut)
    param = bits.view(torch.float32).to(dtype)
    missing = (bits - param.float().view(torch.int32)) >> cut
    return param, (missing * (param.isfinite() & value.isfinite())).to(width)


def truncated(value, dtype, width, noise=None):
    """Bits below the 24th are cut off."""
    cut = dropped_bits(dtype, width)
    return part((value.view(torch.int32) & -(1 << cut)).view(torch.float32), dtype, width)


def fraction_part(value, dtype, width, noise=None):
    """The correction is a fraction of the parameter's last place, computed in floats (as FlashOptim's)."""
    param = value.to(dtype)
    return param, ((value - param.float()) / last_place(param) * 254).round().clamp(-127, 127).to(width)


def fraction_join(param, correction):
    return param.float() + correction / 254 * last_place(param)


def last_place(param):
    return 2.0 ** (param.float().frexp().exponent - 8)


def fails(check, *args):
    with pytest.raises(AssertionError):
        check(*args)


def check_exact(part):
    x = VALUES[reached(VALUES, BF16)]
    param, correction = part(x, BF16, INT16)
    assert torch.equal(join(param, correction).view(torch.int32), x.view(torch.int32))


def test_split16_of_bfloat16_is_exact():
    check_exact(part)
    fails(check_exact, nearest_even)


def check_close(part):
    x = VALUES[reached(VALUES, BF16, INT8) & (VALUES.abs() >= 2.0**-126)]
    error = (join(*part(x, BF16, INT8)).double() - x.double()).abs()
    assert (error <= 2.0**-16 * x.double().abs()).all()


def test_split8_of_bfloat16_is_within_its_bound():
    check_close(part)
    fails(check_close, truncated)
    fails(check_close, nearest_even)


@pytest.mark.parametrize(("width", "unit"), [(INT8, 2.0**-18), (INT16, 0.0)])
def test_float16_is_within_its_bounds(width, unit):
    x = VALUES[reached(VALUES, FP16, width)]
    error = (join(*part(x, FP16, width)).double() - x.double()).abs()
    small = x.abs() < 2.0**-14
    assert (error[~small] <= unit * x[~small].double().abs()).all()
    assert (error[small] <= (2.0**-33 + 2.0**-38 if width == INT8 else 2.0**-38)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_parameter_is_the_nearest_number(dtype, width):
    x = VALUES[reached(VALUES, dtype, width)]
    param, _ = part(x, dtype, width)
    distance, least = ((p.double() - x.double()).abs() for p in (param, x.to(dtype)))
    # Rounding to 24 bits first, and adding 2⁻¹⁴ in float32, cost at most a unit of theirs.
    finest, relative = {
        (BF16, INT8): (2.0**-141, 2.0**-15),
        (BF16, INT16): (0.0, 0.0),
        (FP16, INT8): (2.0**-31, 2.0**-18),
        (FP16, INT16): (2.0**-37, 0.0),
    }[dtype, width]
    unit = (relative * x.abs().double()).clamp(min=finest)
    assert (distance <= least + unit).all()


def check_identity(part, join, dtype, width, values=VALUES):
    """What was read is written as it was, and so lr = 0 changes nothing."""
    param, correction = part(values, dtype, width)
    again, same_correction = part(join(param, correction), dtype, width, noise(values))
    assert same(again, param)
    assert torch.equal(same_correction, correction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_writing_what_was_read_changes_nothing(dtype, width):
    check_identity(part, join, dtype, width)


def test_the_identity_refuses_other_formats():
    fails(check_identity, nearest_even, join, BF16, INT8)
    fails(check_identity, nearest_even, join, BF16, INT16)
    usual = VALUES[(VALUES.abs() > 1e-6) & (VALUES.abs() < 1e6)]
    check_identity(part, join, BF16, INT8, usual)
    fails(check_identity, fraction_part, fraction_join, BF16, INT8, usual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_parameter_and_correction_is_reached(dtype):
    # All pairs, but for negative corrections of 0, come back: the format wastes nothing.
    param = HALVES.to(torch.uint16).view(dtype)
    param = param[param.isfinite()]
    for count in (-128, -127, -1, 0, 1, 64, 127):
        correction = torch.full(param.shape, count, dtype=INT8)
        within = (param != 0) | (correction >= 0)
        again, corrected = part(join(param, correction), dtype, INT8)
        assert same(again[within], param[within])
        assert torch.equal(corrected[within], correction[within])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_nan_infinities_and_overflow(dtype, width):
    x = VALUES[~reached(VALUES, dtype)]
    for bits in (None, noise(x)):
        param, correction = part(x, dtype, width, bits)
        assert same(param, x.to(dtype))
        assert not correction.any()
        assert same(join(param, correction), x.to(dtype).float())
    nan = floats(torch.tensor([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000]))
    for bits in (None, torch.full((5,), 0xFFFFFFFF)):
        assert join(*part(nan, dtype, width, bits)).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_both_signs_are_treated_alike(dtype, width):
    x = VALUES[~VALUES.isnan()]
    for bits in (None, noise(x)):
        (one, kept), (other, also) = part(x, dtype, width, bits), part(-x, dtype, width, bits)
        assert torch.equal(one.view(INT16) ^ -0x8000, other.view(INT16))
        assert torch.equal(kept, also)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_an_overwritten_parameter_is_read_close_to_what_it_is(dtype, width):
    # Zero with a negative correction beside it would be a NaN's bits.
    param = HALVES.to(torch.uint16).view(dtype)
    param = param[param.isfinite()].clone()
    wide = param.double()
    for end in (torch.iinfo(width).min, torch.iinfo(width).max):
        if (dtype, width) == (FP16, INT16):
            end = end // 8
        read = join(param, torch.full(param.shape, end, dtype=width)).double()
        gap = 2.0 ** (wide.abs().frexp().exponent.clamp(min=-125 if dtype == BF16 else -13) - 8.0)
        gap = gap if dtype == BF16 else gap / 8
        assert ((read - wide).abs() <= gap / 2).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_rounding_is_exact_in_the_mean(dtype):
    x = torch.tensor([1 + 2.0**-20, -1.5 - 2.0**-23, math.pi, 1e-3, -35e3, 6.1e-5 * 1.5, 12345.678])
    cut = dropped_bits(dtype, INT8)
    every = torch.arange(1 << cut)[:, None].expand(-1, len(x))
    read = join(*part(x.expand_as(every), dtype, INT8, every)).double()
    assert torch.equal(read.mean(0), x.double())
    if dtype == FP16:
        tiny = torch.tensor([1e-6, -3e-5, 2.0**-26])
        every = every[:, :3]
        read = join(*part(tiny.expand_as(every), dtype, INT8, every)).double()
        # Adding 2⁻¹⁴ rounds once, to 2⁻³⁷.
        assert ((read.mean(0) - tiny.double()).abs() <= 2.0**-38).all()


def moved(dtype, width, stochastic):
    """How far 2,000 updates of 1e-6·p carry p, as a fraction of what they add up to."""
    p = torch.linspace(1.0, 1.9, 500)
    param, correction = part(p, dtype, width)
    start = join(param, correction).double()
    for step in range(2000):
        new = join(param, correction)
        new += 1e-6 * p
        param, correction = part(new, dtype, width, noise(p, step) if stochastic else None)
    return float(((join(param, correction).double() - start) / (2000e-6 * p.double())).mean())


def test_small_updates_add_up():
    assert moved(BF16, INT8, True) == pytest.approx(1, abs=0.1)
    assert moved(BF16, INT16, False) == pytest.approx(1, abs=0.02)
    assert moved(BF16, INT8, False) == 0  # to nearest, as documented


@pytest.mark.parametrize("dtype", DTYPES)
def test_wider_integers_hold_the_same_corrections(dtype):
    x = VALUES[~VALUES.isnan()]
    param, correction = part(x, dtype, INT16)
    other, wide = part(x, dtype, torch.int32)
    assert same(param, other)
    assert torch.equal(correction.int(), wide)
    assert same(join(param, correction), join(param, wide))


def test_values_are_not_changed():
    x = VALUES.clone()
    for dtype in DTYPES:
        param, correction = part(x, dtype, INT8, noise(x))
        kept = param.clone(), correction.clone()
        join(param, correction)
        assert same(param, kept[0])
        assert torch.equal(correction, kept[1])
    assert same(x, VALUES)
