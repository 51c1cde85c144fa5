"""Stochastic rounding into bfloat16 and float16, over all of their values and float32's bit patterns."""

import math

import pytest
import torch

from loops import for_each
from steepest.random import bits32, derive_key, stochastic_round

DTYPES = [torch.bfloat16, torch.float16]
DROPPED = {torch.bfloat16: 16, torch.float16: 13}
NOISE = [0, 1, 0x1000, 0x1FFF, 0x8000, 0xFFFF, 0x12345678, 0xFFFFFFFF]


def every_value(dtype):
    """All 65536 bit patterns."""
    return torch.arange(65536).to(torch.uint16).view(dtype)


def grid(dtype):
    """All finite values in float64, ascending, each once (−0 and 0 are one)."""
    values = every_value(dtype)
    return values[values.isfinite()].double().unique()


def patterns(seed=0, count=1 << 19):
    """Random float32 bit patterns: every exponent, subnormals, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (count,), generator=generator)
    return words.to(torch.int32).view(torch.float32)


def between(seed=0, count=1 << 19):
    """float32 values of the exponents that float16 has, its subnormals included, and some beyond."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-30, 17, (count,), generator=generator)
    sign = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return torch.ldexp(1 + torch.rand(count, generator=generator), exponent) * sign


def noise_for(x, step=0):
    return bits32(derive_key(0, 0, step), torch.arange(x.numel()).view(x.shape))


def neighbours(x, dtype):
    """The greatest value ≤ x and the least ≥ x, for finite x within the range."""
    values = grid(dtype)
    wide = x.double()
    low = values[(torch.searchsorted(values, wide, right=True) - 1).clamp(min=0)]
    high = values[torch.searchsorted(values, wide).clamp(max=len(values) - 1)]
    return low, high


@for_each("dtype", DTYPES)
@for_each("noise", NOISE)
def test_what_the_dtype_represents_comes_back_bit_for_bit(dtype, noise):
    values = every_value(dtype)
    rounded = stochastic_round(values.float(), dtype, torch.full((65536,), noise))
    assert rounded.dtype == dtype
    number = ~values.isnan()
    assert torch.equal(rounded[number].view(torch.int16), values[number].view(torch.int16))
    assert rounded[~number].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [patterns, between])
def test_always_one_of_the_two_neighbours(dtype, make):
    x = make()
    within = x.abs() <= torch.finfo(dtype).max
    x = x[within]
    low, high = neighbours(x, dtype)
    for step in range(3):
        rounded = stochastic_round(x, dtype, noise_for(x, step)).double()
        assert ((rounded == low) | (rounded == high)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [patterns, between])
def test_both_signs_are_treated_alike(dtype, make):
    x = make()
    x = x[~x.isnan()]
    bits = noise_for(x)
    one, other = stochastic_round(x, dtype, bits), stochastic_round(-x, dtype, bits)
    assert torch.equal(one.view(torch.int16) ^ -0x8000, other.view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_beyond_the_largest_value_it_is_to_nearest(dtype):
    largest = torch.finfo(dtype).max
    x = patterns()
    x = torch.cat([x, largest * (1 + torch.rand(10_000) * 1e-2), torch.tensor([math.inf, -math.inf])])
    x = x[x.abs() > largest]
    for noise in NOISE:
        rounded = stochastic_round(x, dtype, torch.full(x.shape, noise))
        assert torch.equal(rounded, x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan(dtype):
    words = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -0x7FFFFF], dtype=torch.int32)
    for noise in NOISE:
        assert stochastic_round(words.view(torch.float32), dtype, torch.full((5,), noise)).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_expectation_over_all_noise_is_exact(dtype):
    # Where exactly `dropped` bits are rounded away, each of the 2**dropped noises once gives x itself.
    dropped = DROPPED[dtype]
    x = torch.tensor([1.0 + 2**-20, -1.5 - 2**-23, 3.14159274, 1e-3, -7e4 / 2, 6.1e-5 * 1.5, 12345.678])
    noise = torch.arange(1 << dropped)[:, None].expand(-1, len(x))
    rounded = stochastic_round(x.expand(1 << dropped, -1), dtype, noise).double()
    assert torch.equal(rounded.mean(0), x.double())


@pytest.mark.parametrize(
    "value", [2.0**-25, 1.3e-7, -1.3e-7, 5e-6, -3.3333e-5, 6.0e-5, 1e-9, -1e-9, 6.1030e-5]
)
def test_float16_subnormals_are_unbiased(value):
    count = 1 << 20
    x = torch.full((count,), value)
    rounded = stochastic_round(x, torch.float16, noise_for(x)).double()
    low, high = neighbours(x[:1], torch.float16)
    up = float((x[0].double() - low) / (high - low))
    # 5 sigma, and at least 5 roundings the other way where that is rarer.
    spread = max(5 * math.sqrt(up * (1 - up) / count), 5 / count)
    assert abs(float((rounded == high).double().mean()) - up) < spread


@pytest.mark.parametrize("dtype", DTYPES)
def test_unbiased_at_random(dtype):
    # The sum of (rounded − x)/spacing over half a million different values: its variance is Σ f(1−f).
    x = between(seed=4)
    x = x[x.abs() <= torch.finfo(dtype).max]
    low, high = neighbours(x, dtype)
    gap = high - low
    x, low, gap = x[gap > 0], low[gap > 0], gap[gap > 0]
    fraction = (x.double() - low) / gap
    rounded = stochastic_round(x, dtype, noise_for(x)).double()
    error = (rounded - x.double()) / gap
    sigma = float((fraction * (1 - fraction)).sum().sqrt())
    assert abs(float(error.sum())) < 5 * sigma


def test_shape_is_kept():
    for shape in [(), (0,), (2, 0, 3), (4, 5)]:
        x = torch.rand(shape)
        assert stochastic_round(x, torch.bfloat16, noise_for(x)).shape == shape


def test_compiled_is_eager():
    def both(x, bits):
        return [stochastic_round(x, dtype, bits) for dtype in DTYPES]

    x = torch.cat([patterns(count=4099), between(count=4099)])
    compiled = torch.compile(both, fullgraph=True)(x, noise_for(x))
    for ours, eager in zip(compiled, both(x, noise_for(x)), strict=True):
        number = ~eager.isnan()
        assert torch.equal(ours[number].view(torch.int16), eager[number].view(torch.int16))
        assert ours[~number].isnan().all()
