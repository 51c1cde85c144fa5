"""The noise: pinned values, the same bits however it is drawn, and the randomness of a good generator."""

import itertools
import math

import pytest
import torch

from steepest.random import bits32, derive_key, stochastic_floor, uniform

COUNT = 1 << 20

# What these give must never change: a resumed run would go another way.
PINNED_INDICES = [0, 1, 2, 3, 1000, 2**31, 2**32, 2**32 + 1, 2**40]
PINNED_BITS = [
    267533251, 229111015, 263459927, 3035210717, 390982736, 1115481243, 2853349503, 1371666935, 1344919201,
]  # fmt: skip
PINNED_STREAM_7 = [
    2076582109, 3635017843, 1372725334, 3285954754, 4221918319, 3830784560, 2071829825, 63979969, 372311649,
]  # fmt: skip


def draw(*, seed=0, tensor=0, step=1, stream=0, first=0, count=COUNT):
    return bits32(derive_key(seed, tensor, step), torch.arange(first, first + count), stream)


# -- the same bits


def test_pinned_values():
    assert derive_key(0) == (0, 3444091743)
    assert derive_key(0, 0, 1) == (3288197150, 302889835)
    assert derive_key(123, 4, 5) == (427767272, 1749175141)
    assert derive_key(2**40 + 7, 1, 2**33) == (2918957895, 3883467263)
    index = torch.tensor(PINNED_INDICES)
    assert bits32((1, 2), index).tolist() == PINNED_BITS
    assert bits32((1, 2), index, stream=7).tolist() == PINNED_STREAM_7
    expected = [(bits >> 8) / 2**24 for bits in PINNED_BITS]
    assert uniform((1, 2), index).tolist() == expected


def mix(x):
    """The published permutation of 32-bit words, in Python's own integers."""
    x ^= x >> 16
    x = x * 0x21F0AAAD % 2**32
    x ^= x >> 15
    x = x * 0x735A2D97 % 2**32
    return x ^ (x >> 15)


def test_bits_are_what_unbounded_integers_give():
    # Products and sums must not have wrapped or met a sign bit.
    keys = [(0, 0), (0xFFFFFFFF, 0xFFFFFFFF), derive_key(9, 8, 7)]
    indices = [0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**48 + 5, 2**62]
    for key, stream in itertools.product(keys, (0, 1, 7)):
        expected = [
            mix((mix((i % 2**32) ^ key[0]) + key[1] + stream * 0x9E3779B9 + (i >> 32) * 0x2545F491) % 2**32)
            for i in indices
        ]
        assert bits32(key, torch.tensor(indices), stream).tolist() == expected


def test_a_key_of_tensors_is_the_key_of_numbers():
    for seed, tensor, step in [(0, 0, 1), (5, 17, 2**20), (2**63 - 1, 3, 2**40)]:
        words = derive_key(seed, torch.tensor(tensor), torch.tensor(step))
        assert tuple(map(int, words)) == derive_key(seed, tensor, step)
        index = torch.arange(100)
        assert torch.equal(bits32(words, index), bits32(derive_key(seed, tensor, step), index))


def test_slices_chunks_and_shapes_do_not_matter():
    key = derive_key(1, 2, 3)
    whole = bits32(key, torch.arange(10_000))
    assert torch.equal(bits32(key, torch.arange(10_000).view(100, 100)), whole.view(100, 100))
    for size in (1, 7, 1000, 4096):
        parts = [bits32(key, chunk) for chunk in torch.arange(10_000).split(size)]
        assert torch.equal(torch.cat(parts), whole)
    strided = torch.arange(10_000).view(100, 100).t()[::3]
    assert torch.equal(bits32(key, strided), whole.view(100, 100).t()[::3])
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(bits32(key, order), whole[order])


def test_compiled_is_eager():
    def both(first, second, index):
        return bits32((first, second), index, 3), uniform((first, second), index, 1)

    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    for key, first in itertools.product([derive_key(0, 0, 1), (0, 0xFFFFFFFF)], [0, 2**32 - 50]):
        index = torch.arange(first, first + 1003)
        words = [torch.tensor(word) for word in key]
        for ours, eager in zip(compiled(*words, index), both(*words, index), strict=True):
            assert torch.equal(ours, eager)


def test_the_global_generator_is_untouched():
    before = torch.get_rng_state()
    uniform(derive_key(0, 1), torch.arange(100))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    one = draw(count=100)
    torch.manual_seed(6)
    assert torch.equal(draw(count=100), one)


# -- randomness


def chi_square_excess(counts: torch.Tensor) -> float:
    """How many standard deviations χ² of equally likely cells is from its mean."""
    expected = counts.sum() / counts.numel()
    freedom = counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


STREAMS = [
    {},
    {"seed": 1},
    {"seed": 2**63 - 1},
    {"tensor": 1000},
    {"step": 10**6},
    {"stream": 7},
    {"first": 2**32 - COUNT // 2},
    {"first": 2**45},
]


@pytest.mark.parametrize("where", STREAMS, ids=str)
def test_every_byte_is_uniform(where):
    bits = draw(**where)
    assert bits.dtype == torch.int64
    assert int(bits.min()) >= 0
    assert int(bits.max()) < 2**32
    for shift in (0, 8, 13, 16, 24):
        cells = torch.bincount((bits >> shift) & 0xFF, minlength=256).double()
        assert abs(chi_square_excess(cells)) < 5, shift


@pytest.mark.parametrize("where", STREAMS, ids=str)
def test_every_bit_is_fair_and_independent_of_the_others(where):
    bits = draw(**where, count=1 << 18) if "first" not in where else draw(**where)[: 1 << 18]
    signs = (((bits[:, None] >> torch.arange(32)) & 1) * 2 - 1).float()
    limit = 5.5 / math.sqrt(len(bits))  # 32·31/2 pairs: 5 sigma each would let 1 in 3000 runs fail
    assert float(signs.mean(0).abs().max()) < limit
    correlation = signs.T @ signs / len(bits) - torch.eye(32)
    assert float(correlation.abs().max()) < limit


@pytest.mark.parametrize("where", STREAMS, ids=str)
def test_uniform_is_uniform(where):
    where = dict(where)
    first, stream = where.pop("first", 0), where.pop("stream", 0)
    key = derive_key(where.get("seed", 0), where.get("tensor", 0), where.get("step", 1))
    u = uniform(key, torch.arange(first, first + COUNT), stream)
    assert u.dtype == torch.float32
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    cells = torch.bincount((u * 1000).long(), minlength=1000).double()
    assert abs(chi_square_excess(cells)) < 5
    assert abs(float(u.double().mean()) - 0.5) < 5 / math.sqrt(12 * COUNT)
    # Multiples of 2⁻²⁴, the lowest of which come up too.
    steps = u.double() * 2**24
    assert torch.equal(steps, steps.round())
    assert chi_square_excess(torch.bincount(steps.long() & 0xFF, minlength=256).double()) < 5


PAIRS = {
    "consecutive steps": ({"step": 1}, {"step": 2}),
    "distant steps": ({"step": 1}, {"step": 2**32 + 1}),
    "tensors": ({"tensor": 0}, {"tensor": 1}),
    "tensor and step exchanged": ({"tensor": 1, "step": 2}, {"tensor": 2, "step": 1}),
    "streams": ({"stream": 0}, {"stream": 1}),
    "the rounding stream": ({"stream": 1}, {"stream": 7}),
    "seeds": ({"seed": 0}, {"seed": 1}),
    "seeds that share 32 bits": ({"seed": 5}, {"seed": 5 + 2**32}),
    "neighbours": ({"first": 0}, {"first": 1}),
    "rows of 1024": ({"first": 0}, {"first": 1024}),
    "indices 2**32 apart": ({"first": 0}, {"first": 2**32}),
    "indices 2**33 apart": ({"first": 0}, {"first": 2**33}),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_independence(pair):
    one, other = (draw(**where, count=1 << 17) for where in PAIRS[pair])
    n = len(one)
    # As numbers,
    x, y = (b.double() / 2**32 - 0.5 for b in (one, other))
    assert abs(float((x * y).mean()) * 12) < 5 / math.sqrt(n)
    assert abs(float(((x * x - 1 / 12) * (y * y - 1 / 12)).mean()) * 180) < 5 / math.sqrt(n)
    # as bits, every one with every other,
    first, second = ((((b[:, None] >> torch.arange(32)) & 1) * 2 - 1).float() for b in (one, other))
    assert float((first.T @ second / n).abs().max()) < 5.5 / math.sqrt(n)
    # and jointly, in 64 × 64 cells of the high bits. No more equal values than chance has.
    cells = torch.bincount((one >> 26) * 64 + (other >> 26), minlength=4096).double()
    assert abs(chi_square_excess(cells)) < 5
    assert int((one == other).sum()) <= 2


def test_no_value_repeats_within_a_step():
    # A permutation of the index: 2**20 draws with replacement would have about 128 repeats.
    assert len(draw().unique()) == COUNT


def test_keys_differ_and_are_spread():
    keys = {derive_key(seed, tensor, step) for seed in (0, 1) for tensor in range(100) for step in range(100)}
    assert len(keys) == 20_000
    words = torch.tensor([derive_key(0, 0, step) for step in range(20_000)])
    for word in words.T:
        assert abs(chi_square_excess(torch.bincount(word >> 24, minlength=256).double())) < 5


# -- integers at random


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stochastic_floor_never_moves_an_integer(dtype):
    integers = torch.arange(-40_000, 40_000, dtype=dtype)
    for u in (0.0, 0.5, 1 - 2.0**-24):
        assert torch.equal(stochastic_floor(integers, torch.full_like(integers, u)), integers)


@pytest.mark.parametrize("x", [0.25, -0.25, 3.7, -3.7, 55.99, 1e-3, -1e-3, 300.1, -32766.3])
def test_stochastic_floor_is_unbiased_between_its_two_integers(x):
    u = uniform(derive_key(1, 2), torch.arange(COUNT))
    value = torch.tensor(x)
    floors = stochastic_floor(value.expand(COUNT), u).double()
    assert set(floors.unique().tolist()) == {math.floor(x), math.floor(x) + 1}
    exact = float(value) - math.floor(x)
    assert abs(float(floors.mean()) - float(value)) < 5 * math.sqrt(exact * (1 - exact) / COUNT)
