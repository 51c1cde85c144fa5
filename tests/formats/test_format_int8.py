"""One-byte codes: float64 is the oracle, and each check must fail a deliberately wrong variant."""

import math

import pytest
import torch

from steepest.formats.int8 import (
    decode,
    decode_nonnegative,
    decode_signed,
    encode_nonnegative,
    encode_signed,
)

TINY = 2.0**-126
LAST = 1 - 2.0**-24  # the largest u
SCALES = [1e-30, 1e-20, 1e-8, 1.0, 3e5, 1e15, 1e30]
FOURTH = 255.0**4


def blocks(seed=0, count=200, block=64, spread=4.0):
    """Log-normal blocks of both signs, with a few zeros, in float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, block, generator=generator)
    x *= torch.exp(spread * torch.randn(count, block, generator=generator))
    x[torch.rand(count, block, generator=generator) < 0.02] = 0
    return x / x.abs().amax(-1, keepdim=True)


def noise(x, seed=0):
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))


def nearest(x, u=None):
    return encode_nonnegative(x, None)


def with_half_scales(encode):
    """Scales in float16."""

    def wrong(*args):
        codes, scale = encode(*args)
        return codes, scale.half().float()

    return wrong


def linear(x):
    scale = x.abs().amax(-1)
    return (x / scale[..., None] * 127).round().to(torch.int8), scale


def with_zero_code(x, u):
    """v rounded in its own steps, and to 0 where it is small."""
    scale = x.amax(-1)
    y = 255 * (x / scale[..., None]).double() ** 0.25
    return (y + 0.5).floor().nan_to_num().to(torch.uint8), scale


def without_limit(encode):
    """Scales below 2**-126 as they are, and infinite ones too."""

    def wrong(x, *args):
        codes, _ = encode(x, *args)
        return codes, x.abs().amax(-1)

    return wrong


def fails(check, *args):
    with pytest.raises(AssertionError):
        check(*args)


def check_signed(encode):
    for at, size in enumerate(SCALES):
        x = blocks(at) * size
        codes, scale = encode(x)
        assert codes.dtype == torch.int8
        a = x.abs().amax(-1, keepdim=True).double()
        t = x.double().abs() / a
        error = (decode_signed(codes, scale).double() - x.double()).abs()
        assert (error <= a * (t.sqrt() / 127 + 1 / 254**2 + 2.0**-21)).all()
        assert (codes.abs().amax(-1) == 127).all()
        # The code itself, wherever rounding is not close to a tie.
        y = 127 * t.sqrt()
        clear = ((y - y.floor()) - 0.5).abs() > 1e-4
        assert torch.equal(codes[clear].double(), (y.round() * x.sign())[clear])


def check_nonnegative(encode):
    for at, size in enumerate(SCALES):
        x = blocks(at).abs() * size
        for u in (noise(x), torch.zeros_like(x), torch.full_like(x, LAST), None):
            codes, scale = encode(x, u)
            assert codes.dtype == torch.uint8
            a = x.amax(-1, keepdim=True).double()
            y, read = ((v.double() / a) ** 0.25 for v in (x, decode_nonnegative(codes, scale)))
            assert ((read - y).abs() <= 1 / 255 + 1e-5).all()
            assert (codes.amax(-1) == 255).all()


def test_errors_are_within_the_bounds():
    check_signed(encode_signed)
    check_nonnegative(encode_nonnegative)


def test_the_bounds_refuse_float16_scales_and_linear_codes():
    fails(check_signed, with_half_scales(encode_signed))
    fails(check_signed, linear)
    fails(check_nonnegative, with_half_scales(encode_nonnegative))


def check_again(encode, values, smallest):
    """A block that holds every code, at many scales, is read and written without a change."""
    codes = values.expand(500, -1)
    scale = torch.logspace(math.log10(smallest), 37, 500)
    new, again = encode(decode(codes, scale))
    assert torch.equal(new, codes)
    assert torch.equal(again, scale)


SIGNED = torch.arange(-127, 128, dtype=torch.int8)
NONNEGATIVE = torch.arange(256, dtype=torch.uint8)


def test_writing_what_was_read_changes_nothing():
    check_again(encode_signed, SIGNED, 2 * TINY)
    for u in (0.001, 0.5, LAST):
        # Below 2e-34 the least codes stand for subnormal numbers.
        check_again(lambda x, u=u: encode_signed(x, u * torch.ones_like(x)), SIGNED, 2e-34)
    for u in (None, 0.001, 0.5, LAST):
        # Below 1e-27 the least codes stand for subnormal numbers, or for 0.
        check_again(lambda x, u=u: encode_nonnegative(x, u), NONNEGATIVE, 1e-27)


def test_writing_again_refuses_float16_scales_and_truncated_codes():
    fails(check_again, with_half_scales(encode_signed), SIGNED, 2 * TINY)

    def truncated(x):
        scale = x.amax(-1)
        return (255 * (x / scale[..., None]).rsqrt().rsqrt()).floor().to(torch.uint8), scale

    fails(check_again, truncated, NONNEGATIVE, 1e-27)


@pytest.mark.parametrize("power", [-60, -7, 1, 50])
def test_powers_of_two_change_the_scale_alone(power):
    x = blocks(spread=2.0)
    for encode, v in ((encode_signed, x), (lambda v: encode_nonnegative(v, noise(v)), x.abs())):
        (codes, scale), (others, larger) = encode(v), encode(v * 2.0**power)
        assert torch.equal(codes, others)
        assert torch.equal(scale * 2.0**power, larger)


def check_extremes(encode):
    """Zero and subnormal blocks become 0; a NaN or infinity makes its own block NaN, and no other."""
    x = torch.ones(9, 64)
    x[0], x[1], x[2] = 0, TINY / 2, 1e-45
    x[3, 5], x[4, 6] = math.nan, math.inf
    x[5] = math.inf
    x[6, 1:] = 1e-45
    x[7] = torch.finfo(torch.float32).max
    codes, scale = encode(x)
    assert scale.tolist()[:3] == [0, 0, 0]
    assert scale[3:6].isnan().all()
    assert not codes[:6].any()
    read = decode(codes, scale)
    assert not read[:3].any()
    assert read[3:6].isnan().all()
    assert read[6:].isfinite().all()
    assert torch.equal(read[7:], x[7:])


def test_extremes():
    check_extremes(encode_signed)
    check_extremes(lambda x: encode_nonnegative(x, torch.full_like(x, 0.3)))
    x = torch.ones(1, 64)
    x[0, 3] = -math.inf
    assert decode(*encode_signed(x)).isnan().all()


def test_extremes_refuse_scales_without_limits():
    fails(check_extremes, without_limit(encode_signed))
    fails(check_extremes, without_limit(lambda x: encode_nonnegative(x, None)))


def check_decay(encode, x):
    """2,000 steps without a gradient: an average falls to 0, and is never NaN."""
    codes, scale = encode(x)
    for _ in range(2000):
        before = decode(codes, scale)
        codes, scale = encode(before * 0.9)
        after = decode(codes, scale)
        assert (after.abs() <= before.abs()).all()
    assert not after.any()
    assert not scale.any()


def test_averages_fall_to_zero_without_gradients():
    x = blocks(count=4, spread=1.0) * 1e-3
    check_decay(encode_signed, x)
    check_decay(lambda v: encode_nonnegative(v, torch.full_like(v, 0.5)), x.abs())


def test_common_decay_keeps_the_codes():
    x = blocks(count=50, spread=1.5)
    codes, scale = encode_signed(x)
    first = codes
    for _ in range(300):
        codes, scale = encode_signed(decode_signed(codes, scale) * 0.99)
    assert torch.equal(codes, first)


def check_zero_code(encode):
    """Code 0 stands for 0, and for nothing else, however small the value beside the largest."""
    x = torch.cat([torch.zeros(3), torch.logspace(-45, -0.1, 60), torch.ones(1)])
    for size in (1e-5, 1.0, 1e30):
        v = (x * size)[None]
        for u in (None, *(torch.full_like(v, each) for each in (0.0, 0.5, LAST))):
            codes, _ = encode(v, u)
            assert torch.equal(codes == 0, v == 0)


def test_only_zero_has_the_code_zero():
    check_zero_code(encode_nonnegative)
    fails(check_zero_code, with_zero_code)


def test_values_are_not_changed():
    x = blocks()
    v, u = x.abs(), noise(x)
    kept = [t.clone() for t in (x, v, u)]
    encode_signed(x)
    encode_nonnegative(v, u)
    assert all(map(torch.equal, kept, (x, v, u)))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 32), (2, 3, 32), (64,)])
def test_shapes(shape):
    x = torch.rand(shape)
    for codes, scale in (encode_signed(x), encode_nonnegative(x, noise(x))):
        assert codes.shape == shape
        assert scale.shape == shape[:-1]
        assert decode(codes, scale).shape == shape


def check_mean(encode):
    """The mean of 200,000 encodings of 31 values is the values: |z| < 4, and 1e-6 for float32's rounding."""
    count = 200_000
    v = torch.cat([torch.logspace(math.log10(3 / FOURTH), -0.002, 31), torch.ones(1)]) * 3e-7
    x = v.expand(count, -1)
    codes, scale = encode(x, noise(x, 5))
    mean = (codes.double() / 255).pow(4).mean(0) * float(scale[0])
    t = v.double() / v.double().max()
    low = (255 * t**0.25 + 1e-5).floor().clamp(max=254)
    lower, upper = ((code / 255) ** 4 for code in (low, low + 1))
    up = (t - lower) / (upper - lower)
    sigma = (upper - lower) * (up * (1 - up)).clamp(min=0).sqrt() / math.sqrt(count)
    assert ((mean - v.double()).abs() <= (4 * sigma + 1e-6 * t) * float(v.max())).all()


def test_encodings_are_right_in_the_mean():
    check_mean(encode_nonnegative)
    fails(check_mean, nearest)
    fails(check_mean, lambda x, u: encode_nonnegative(x, 0.97 * u))


def check_signed_mean(encode):
    """The same of 63 values of both signs."""
    count = 200_000
    half = torch.cat([torch.logspace(-4.5, -0.002, 31), torch.ones(1)]) * 3e-7
    v = torch.cat([half, -half])
    codes, scale = encode(v.expand(count, -1), noise(v.expand(count, -1), 6))
    mean = (codes.double().abs() * codes.double() / 127**2).mean(0) * float(scale[0])
    t = v.double().abs() / v.double().max()
    low = (127 * t.sqrt() + 1e-5).floor().clamp(max=126)
    lower, upper = ((code / 127) ** 2 for code in (low, low + 1))
    up = (t - lower) / (upper - lower)
    sigma = (upper - lower) * (up * (1 - up)).clamp(min=0).sqrt() / math.sqrt(count)
    assert ((mean - v.double()).abs() <= (4 * sigma + 1e-6 * t) * float(v.max())).all()


def test_signed_encodings_are_right_in_the_mean():
    check_signed_mean(encode_signed)
    fails(check_signed_mean, lambda x, u: encode_signed(x))
    fails(check_signed_mean, lambda x, u: encode_signed(x, 0.97 * u))


def check_average(encode):
    """1,000 steps of an AdamW's second moment: v and √v, in the mean, within 1 % of float64's.

    Gradients grow smaller, beside one that does not, so that the averages fall and the scales stay.
    """
    generator = torch.Generator().manual_seed(3)
    exact = torch.rand(256, 64, generator=generator).double()
    sizes = torch.full((64,), 0.3)
    exact[:, 0] = sizes[0] = 1
    codes, scale = encode(exact.float(), torch.full((256, 64), 0.5))
    for step in range(1000):
        square = (sizes * (0.5 + torch.rand(256, 64, generator=generator))).square()
        square[:, 0] = 1
        exact = 0.999 * exact + 0.001 * square.double()
        codes, scale = encode(0.999 * decode_nonnegative(codes, scale) + 0.001 * square, noise(square, step))
    read = decode_nonnegative(codes, scale).double()
    assert abs(float((read / exact).sqrt().mean()) - 1) < 0.01
    assert abs(float((read / exact).mean()) - 1) < 0.01


def test_a_second_moment_is_unbiased():
    check_average(encode_nonnegative)
    fails(check_average, nearest)
