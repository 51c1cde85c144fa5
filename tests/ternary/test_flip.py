"""Votes, accumulators and flips against the update written out in Python."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from loops import for_each
from steepest.random import derive_key
from steepest.ternary import BinaryLinear, TernaryFlip, TernaryLinear
from steepest.ternary.flipping import flip_layer
from steepest.ternary.packing import pack, unpack
from steepest.ternary.schedule import annealed
from steepest.ternary.votes import magnitude_votes, sign_votes

from . import reference
from .models import accumulators, after

KEY = (1, 2)


def flip(values, a, votes, bits=2, **options):
    """One step of a layer given as int8 matrices: (T, a, flips)."""
    packed, a, votes = pack(values, bits=bits), a.clone(), votes.clone()
    given = {"threshold": 4, "outward": "cancel", "zero_pull": 0.0, "at_most": None, "key": KEY, **options}
    flips = flip_layer(packed, a, votes, bits=bits, **given)
    return unpack(packed, values.shape[1], bits=bits), a, int(flips)


@pytest.mark.parametrize("outward", ["drop", "cancel"])
@pytest.mark.parametrize(
    ("accumulator", "threshold", "passes"),
    [(torch.int8, 5, 1), (torch.int8, 5, 3), (torch.int8, 120, 3), (torch.int16, 200, 3)],
)
@pytest.mark.parametrize("kind", [TernaryLinear, BinaryLinear])
def test_training_follows_the_reference(kind, outward, accumulator, threshold, passes):
    # The layer is the identity in front of a gradient of the test's own choosing: dT = dyᵀ x.
    torch.manual_seed(0)
    columns, rows = 7, 5
    layer = kind(columns, rows, bias=False, scale="row", dtype=torch.float64)
    layer.scale.data.fill_(1.0)
    trainer = TernaryFlip(layer, threshold, accumulator=accumulator, outward=outward)
    weights = layer.unpack().flatten().tolist()
    counters = [0] * len(weights)
    drift = torch.randn(rows, columns, dtype=torch.float64)
    moved = 0
    for _ in range(100 if threshold < 100 else 250):
        votes = [[] for _ in weights]
        for _ in range(passes):
            grad = drift + torch.randn(rows, columns, dtype=torch.float64)
            y = layer(torch.eye(columns, dtype=torch.float64))
            y.backward(grad.t().contiguous())
            for at, each in enumerate(grad.flatten().tolist()):
                votes[at].append(-int(math.copysign(1, each)))
        before = list(weights)
        limit = torch.iinfo(accumulator).max
        options = {"threshold": threshold, "limit": limit, "outward": outward, "bits": layer.bits}
        reference.step(weights, counters, votes, **options)
        trainer.step()
        assert layer.unpack().flatten().tolist() == weights
        assert accumulators(trainer)[""].flatten().tolist() == counters
        flips = sum(one != other for one, other in zip(before, weights, strict=True))
        assert trainer.stats().flips == flips
        moved += flips
        drift = drift.roll(1) if torch.rand(()) < 0.02 else drift
    assert moved > 5
    assert trainer.stats().total_flips == moved


@pytest.mark.parametrize(("dtype", "limit"), [(torch.int8, 127), (torch.int16, 32767)])
def test_accumulators_saturate_and_do_not_wrap(dtype, limit):
    values = torch.zeros(1, 3, dtype=torch.int8)
    a = torch.tensor([[limit - 1, 1 - limit, 0]], dtype=dtype)
    votes = torch.tensor([[127, -127, 5]], dtype=torch.int8)
    found, a, flips = flip(values, a, votes, threshold=limit + 1)
    assert a.tolist() == [[limit, -limit, 5]]
    assert not found.any()
    assert flips == 0
    assert flip(values, a, votes, threshold=limit)[0].tolist() == [[1, -1, 0]]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.int8, 127), (torch.int16, 32767)])
def test_votes_wider_than_shorts_saturate_and_do_not_wrap(dtype, limit):
    values, a = torch.zeros(1, 4, dtype=torch.int8), torch.tensor([[1, -1, 0, 0]], dtype=dtype)
    votes = torch.tensor([[40000, -40000, 32768, 1 << 17]], dtype=torch.int32)
    _, a, flips = flip(values, a, votes, threshold=limit + 1)
    assert a.tolist() == [[limit, -limit, limit, limit]]
    assert flips == 0


def test_a_weight_passes_through_zero():
    values, a = torch.tensor([[-1, 1]], dtype=torch.int8), torch.zeros(1, 2, dtype=torch.int8)
    votes, seen = torch.tensor([[4, -4]], dtype=torch.int8), []
    for _ in range(2):
        values, a, _ = flip(values, a, votes)
        seen.append(values.tolist())
    assert seen == [[[0, 0]], [[1, -1]]]


def test_a_binary_weight_changes_its_sign_at_once():
    values, a = torch.tensor([[-1, 1, 1]], dtype=torch.int8), torch.zeros(1, 3, dtype=torch.int8)
    votes = torch.tensor([[4, -4, -3]], dtype=torch.int8)
    assert [each.tolist() for each in flip(values, a, votes, bits=1)[:2]] == [[[1, -1, 1]], [[0, 0, -3]]]


@pytest.mark.parametrize("votes", ["sign", "magnitude"])
@pytest.mark.parametrize("outward", ["drop", "cancel"])
def test_votes_for_the_sign_that_a_binary_weight_has_do_not_accumulate(outward, votes):
    layer = BinaryLinear(2, 1, bias=False)
    layer.set_ternary(torch.tensor([[1, -1]]))
    layer.scale.data.fill_(1.0)
    trainer = TernaryFlip(layer, 50, votes, outward=outward)
    for _ in range(30):
        layer(torch.tensor([[-1.0, 1.0]])).sum().backward()
        trainer.step()
    assert accumulators(trainer)[""].tolist() == [[0, 0]]


@pytest.mark.parametrize("outward", ["drop", "cancel"])
def test_at_a_bound_nothing_accumulates_outward(outward):
    layer = TernaryLinear(3, 1, bias=False)
    layer.set_ternary(torch.tensor([[1, -1, 0]]))
    layer.scale.data.fill_(1.0)
    trainer = TernaryFlip(layer, 50, outward=outward)
    for _ in range(30):
        layer(torch.tensor([[-1.0, 1.0, -1.0]])).sum().backward()
        trainer.step()
    assert accumulators(trainer)[""].tolist() == [[0, 0, 30]]


def test_by_noise_alone_cancelling_keeps_a_weight_and_dropping_does_not():
    # Half of the votes are inward: dropped outward votes leave those, and they carry the weight to 0.
    torch.manual_seed(0)
    left = {}
    for outward in ("drop", "cancel"):
        layer = TernaryLinear(1000, 1, bias=False)
        layer.set_ternary(torch.ones(1, 1000))
        layer.scale.data.fill_(1.0)
        trainer = TernaryFlip(layer, 20, outward=outward)
        for _ in range(60):
            layer(torch.randn(1, 1000)).sum().backward()
            trainer.step()
        left[outward] = float((layer.unpack() == 1).float().mean())
    assert left["drop"] < 0.05
    assert left["cancel"] > 0.9


def test_votes_are_the_sign_of_the_gradient_whatever_the_scales():
    torch.manual_seed(0)
    layer = TernaryLinear(6, 4, bias=False, scale="group", group_size=4)
    layer.scale.data.copy_(torch.randn(4, 2))
    trainer = TernaryFlip(layer, outward="cancel")
    weight = layer.dense().requires_grad_()
    x = torch.randn(9, 6)
    (x @ weight.t()).square().sum().backward()
    layer(x).square().sum().backward()
    # dT = dW∘s: a negative scale turns the vote.
    scales = layer.scale.data.repeat_interleave(4, 1)[:, :6]
    assert torch.equal(trainer.targets.buffers[""].pending, -(weight.grad * scales).sign().to(torch.int8))


@pytest.mark.parametrize("kind", ["sign", "magnitude"])
def test_scaling_the_loss_changes_no_vote(kind):
    found = []
    # The last two have squares that float32 has not.
    for factor in (1.0, 2.0**16, 2.0**-16, 2.0**100, 2.0**-100):
        torch.manual_seed(0)
        layer = TernaryLinear(6, 4)
        trainer = TernaryFlip(layer, votes=kind)
        (factor * layer(torch.randn(9, 6)).square().sum()).backward()
        found.append(trainer.targets.buffers[""].pending)
    assert found[0].any()
    assert all(torch.equal(found[0], each) for each in found[1:])


def test_magnitude_votes_are_unbiased_and_clipped():
    grad = torch.tensor([0.25, -0.75, 3.5, 100.0, -100.0, 0.0, -2.0])
    inverse, index = torch.tensor(1.0), torch.arange(7)
    draws = torch.stack(
        [magnitude_votes(grad, inverse, derive_key(0, step), index) for step in range(4000)]
    ).double()
    expected = -grad.clamp(-7, 7).double()
    # Five standard errors of a fair coin's mean.
    assert bool(((draws.mean(0) - expected).abs() <= 5 * 0.5 / math.sqrt(4000)).all())
    whole = expected == expected.round()
    assert torch.equal(draws[:, whole], expected[whole].expand(4000, -1))
    assert bool(((draws - expected).abs() < 1).all())


def test_votes_by_magnitude_are_relative_to_the_layers_rms():
    torch.manual_seed(0)
    layer = TernaryLinear(40, 30, bias=False)
    trainer = TernaryFlip(layer, votes="magnitude", outward="cancel")
    weight = layer.dense().requires_grad_()
    x = torch.randn(9, 40)
    (x @ weight.t()).square().sum().backward()
    layer(x).square().sum().backward()
    grad = weight.grad * layer.scale.data[:, None]
    exact = -(grad / grad.square().mean().sqrt()).clamp(-7, 7)
    votes = trainer.targets.buffers[""].pending
    assert votes.dtype == torch.int8
    assert bool(((votes - exact).abs() < 1 + 1e-4).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_gradients_that_are_not_finite_do_not_vote(bad):
    grad = torch.tensor([bad, 1.0, -1.0])
    assert sign_votes(grad).tolist() == [0, -1, 1]
    assert magnitude_votes(grad, torch.tensor(1.0), KEY, torch.arange(3)).tolist() == [0, -1, 1]


@pytest.mark.parametrize(
    ("step", "threshold"), [(0, 8.0), (50, 16.0), (75, 32.0), (99, 800.0), (100, math.inf)]
)
def test_the_annealed_threshold(step, threshold):
    layer = TernaryLinear(2, 2)
    trainer = TernaryFlip(layer, 8, schedule="annealed", total_steps=100)
    after(trainer, step)
    assert trainer.stats().threshold == pytest.approx(threshold)


def test_the_annealed_threshold_is_exact_where_it_is_whole():
    for total in (1, 7, 100, 360):
        for step in range(total):
            for threshold in (1, 16, 24):
                exact = Fraction(threshold * total, total - step)
                found = annealed(threshold, step, total)
                assert math.ceil(found) == math.ceil(exact)
                assert found == pytest.approx(float(exact), rel=1e-14)
    assert annealed(3, 96, 100, 0.5) == 15.0


@pytest.mark.parametrize("power", [107.0, 200.0])
def test_an_annealed_threshold_beyond_all_floats_is_infinite(power):
    # 0.001 to that power is less than any normal float, or 0.
    assert annealed(16, 999, 1000, power) == math.inf


def test_the_annealed_thresholds_power():
    trainer = TernaryFlip(TernaryLinear(2, 2), 8, schedule="annealed", total_steps=100, power=0.3)
    after(trainer, 75)
    assert trainer.stats().threshold == pytest.approx(8 * 4**0.3)


def test_thresholds_between_integers_are_reached_by_the_next():
    values, zero = torch.zeros(1, 1, dtype=torch.int8), torch.zeros(1, 1, dtype=torch.int8)
    layer = TernaryLinear(1, 1)
    layer.set_ternary(values)
    layer.scale.data.fill_(1.0)
    trainer = TernaryFlip(layer, 2.5)
    flips = []
    for _ in range(3):
        layer(torch.tensor([[-1.0]])).sum().backward()
        trainer.step()
        flips.append(trainer.stats().flips)
    assert flips == [0, 0, 1]
    assert accumulators(trainer)[""].equal(zero)


def test_when_the_threshold_is_out_of_reach_nothing_flips_and_votes_are_still_counted():
    layer = TernaryLinear(1, 1)
    layer.set_ternary(torch.zeros(1, 1))
    layer.scale.data.fill_(1.0)
    trainer = TernaryFlip(layer, 1, schedule=lambda step: 1000.0 if step < 200 else 1.0)
    for _ in range(200):
        layer(torch.tensor([[-1.0]])).sum().backward()
        trainer.step()
        assert trainer.stats().flips == 0
    assert accumulators(trainer)[""].tolist() == [[127]]
    layer(torch.tensor([[-1.0]])).sum().backward()
    trainer.step()
    assert layer.unpack().tolist() == [[1]]


@for_each("bits", [1, 2])
@for_each("seed", range(5))
@for_each("at_most", [0, 1, 7, 40])
def test_at_most_so_many_flip_and_those_with_the_most_votes(seed, at_most, bits):
    torch.manual_seed(seed)
    values = torch.randint(-1, 2, (9, 11), dtype=torch.int8)
    values = values if bits == 2 else 2 * (values > 0).to(torch.int8) - 1
    zero = torch.zeros(9, 11, dtype=torch.int8)
    votes = torch.randint(-9, 10, (9, 11), dtype=torch.int8)
    free, a, count = flip(values, zero, votes, bits)
    found, left, flips = flip(values, zero, votes, bits, at_most=at_most, key=derive_key(seed, 0))
    assert flips == min(at_most, count)
    chosen = found != values
    assert torch.equal(found[chosen], free[chosen])
    assert not left[chosen].any()
    # Weights passed over have no more votes than any that flipped, and keep them.
    passed = (free != values) & ~chosen
    assert torch.equal(left[passed], votes[passed])
    if chosen.any() and passed.any():
        assert votes[passed].abs().max() <= votes[chosen].abs().min()
    assert torch.equal(left[~chosen & ~passed], a[~chosen & ~passed])


def test_ties_are_broken_at_random_by_the_key():
    zero, votes = torch.zeros(10, 10, dtype=torch.int8), torch.full((10, 10), 5, dtype=torch.int8)
    picks = [flip(zero, zero, votes, at_most=10, key=derive_key(0, step))[0] for step in (0, 0, 1)]
    assert torch.equal(picks[0], picks[1])
    assert not torch.equal(picks[0], picks[2])
    total = sum(flip(zero, zero, votes, at_most=10, key=derive_key(1, step))[0].long() for step in range(400))
    # Every place as often as any other: 40 of 400 times, with a standard deviation of 6.
    assert total.min() > 40 - 30
    assert total.max() < 40 + 30


def test_the_pull_toward_zero_has_its_probability_and_direction():
    values = torch.tensor([1, -1, 0], dtype=torch.int8).repeat(200, 1)
    zero = torch.zeros(200, 3, dtype=torch.int8)
    _, a, _ = flip(values, zero, zero, zero_pull=0.25, threshold=100)
    assert set(a[:, 0].tolist()) == {0, -1}
    assert set(a[:, 1].tolist()) == {0, 1}
    assert not a[:, 2].any()
    assert abs(a[:, 0].float().mean().item() + 0.25) < 0.16
    _, always, _ = flip(values, zero, zero, zero_pull=1.0, threshold=100)
    assert torch.equal(always, -values)


@pytest.mark.parametrize("columns", [1, 3, 5, 1000])
def test_chunks_change_nothing(columns, monkeypatch):
    from steepest.ternary import chunks

    torch.manual_seed(0)
    values = torch.randint(-1, 2, (17, columns), dtype=torch.int8)
    a, votes = (torch.randint(-9, 10, (17, columns), dtype=torch.int8) for _ in range(2))
    options = {"zero_pull": 0.3, "at_most": 5}
    whole = flip(values, a, votes, **options)
    monkeypatch.setattr(chunks, "_CHUNK_ON_CPU", 2 * columns)
    for one, other in zip(flip(values, a, votes, **options)[:2], whole[:2], strict=True):
        assert torch.equal(one, other)


def test_stats_are_one_call_for_everything_one_watches():
    torch.manual_seed(0)
    model = nn.Sequential(TernaryLinear(6, 5), TernaryLinear(5, 3))
    trainer = TernaryFlip(model, 1)
    for x in torch.randn(3, 4, 6):
        model(x).square().sum().backward()
        trainer.step()
    stats = trainer.stats()
    zeros = [int((layer.unpack() == 0).sum()) for layer in model]
    assert (stats.step, stats.weights, stats.threshold) == (3, 45, 1.0)
    assert [layer.zeros for layer in stats.layers] == [zeros[0] / 30, zeros[1] / 15]
    assert stats.zeros == sum(zeros) / 45
    assert stats.flips == sum(layer.flips for layer in stats.layers)
    assert [layer.name for layer in stats.layers] == ["0", "1"]
    for word in ("step 3", "45", "zeros", "threshold 1"):
        assert word in str(stats)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threshold": 0}, "threshold must be a finite number > 0, got 0"),
        ({"threshold": 128}, "saturates at 127; accumulator=torch.int16 holds 32767"),
        ({"threshold": 40000, "accumulator": torch.int16}, "saturates at 32767"),
        ({"accumulator": torch.int32}, "accumulator must be one of"),
        ({"votes": "size"}, "'size'"),
        ({"schedule": "annealed"}, "needs total_steps"),
        ({"schedule": "linear"}, "'linear'"),
        ({"zero_pull": 1.5}, "zero_pull must be"),
        ({"max_flip_fraction": -0.1}, "max_flip_fraction must be"),
        ({"outward": "keep"}, "'keep'"),
        ({"nonfinite": "stop"}, "'stop'"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_wrong_options_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        TernaryFlip(TernaryLinear(2, 2), **options)


def test_models_that_cannot_be_trained_so_are_refused():
    with pytest.raises(TypeError, match="Module, got list"):
        TernaryFlip([])
    with pytest.raises(ValueError, match=r"no ternary layers: steepest.ternary.ternarize"):
        TernaryFlip(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layer '0' is on the meta device"):
        TernaryFlip(nn.Sequential(TernaryLinear(2, 2, device="meta")))
    with pytest.raises(ValueError, match="zero_pull is for ternary weights, and layer '1' is binary"):
        TernaryFlip(nn.Sequential(TernaryLinear(2, 2), BinaryLinear(2, 2)), zero_pull=0.1)


def test_a_schedule_that_gives_no_threshold_is_refused_before_anything_changes():
    layer = TernaryLinear(2, 2)
    trainer = TernaryFlip(layer, schedule=lambda step: -1.0)
    layer(torch.ones(1, 2)).sum().backward()
    before = layer.packed.clone()
    with pytest.raises(ValueError, match=r"step 0 must be above 0, got -1.0"):
        trainer.step()
    assert torch.equal(layer.packed, before)
    assert not trainer.state


def test_all_small_cases_of_one_weight():
    for value, a, vote, outward, bits in itertools.product(
        (-1, 0, 1), range(-3, 4), range(-4, 5), ("drop", "cancel"), (1, 2)
    ):
        if bits == 1 and value == 0:
            continue
        weights, accumulators = [value], [a]
        # Under "drop", outward votes do not reach the step.
        if outward == "drop" and value * vote > 0:
            vote = 0
        options = {"threshold": 3, "outward": outward, "bits": bits}
        reference.step(weights, accumulators, [[vote]], limit=127, **options)
        made = [torch.tensor([[n]], dtype=torch.int8) for n in (value, a, vote)]
        found, left, _ = flip(*made, **options)
        assert (found.item(), left.item()) == (weights[0], accumulators[0]), (value, a, vote, options)
