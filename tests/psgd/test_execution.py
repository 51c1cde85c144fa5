"""Test that batching, layouts, views, state dicts, replicas and torch's generator do not change results."""

from __future__ import annotations

import copy
import io
import itertools
import math

import pytest
import torch

import steepest
from loops import for_each
from steepest.rule import find_rule
from steepest.rules.psgd import fits_in
from steepest.rules.psgd.factors import Side, balanced

from .fitting import KINDS, generator

SHAPES = [(6, 6), (6, 6), (6, 6), (4, 10), (4, 10), (5,), (5,), (), (3, 2, 3), (0, 4), (0,)]
OPTIONS = [{}, {"update_probability": 0.25, "update_flat_steps": 5, "update_decay_steps": 0}]


def make(kind, shapes=SHAPES, dtype=torch.float32, **options):
    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    return params, KINDS[kind](params, lr=0.01, **options)


def train(params, optimizer, steps):
    for step in steps:
        for index, param in enumerate(params):
            draw = generator(1000 * step + index)
            param.grad = (0.1 * torch.randn(param.shape, generator=draw)).to(param.dtype)
        optimizer.step()


def same_state(one, other):
    for a, b in zip(one.state.values(), other.state.values(), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_batched_equals_looped(kind):
    """With bucket_bytes=1 every matrix is computed alone; batched products round like single ones."""
    both = [make(kind, dtype=torch.float64, bucket_bytes=size) for size in (1 << 28, 1)]
    for params, optimizer in both:
        train(params, optimizer, range(20))
    for one, other in zip(both[0][0], both[1][0], strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_stride_order_does_not_matter(kind):
    plain, strided = (torch.nn.Parameter(torch.ones(4, 3, 2, 2)) for _ in range(2))
    strided = torch.nn.Parameter(strided.detach().to(memory_format=torch.channels_last))
    runs = []
    for param in (plain, strided):
        optimizer = KINDS[kind]([param], lr=0.01)
        train([param], optimizer, range(5))
        assert optimizer.state[param]["momentum_buffer"].stride() == param.stride()
        runs.append(param.detach())
    assert torch.equal(*runs)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_equals_separate(kind):
    sizes = (4, 4, 6)
    fused = torch.nn.Parameter(torch.ones(14, 5, dtype=torch.float64))
    bias = torch.nn.Parameter(torch.ones(14, dtype=torch.float64))
    blocks = [torch.nn.Parameter(torch.ones(size, 5, dtype=torch.float64)) for size in sizes]
    pieces = [torch.nn.Parameter(torch.ones(size, dtype=torch.float64)) for size in sizes]
    views = {"qkv": steepest.views.rows(*sizes), "bias": steepest.views.rows(*sizes)}
    options = {"lr": 0.01, "noise_scale": 0.0, "norm": "exact"}
    together = KINDS[kind]([("qkv", fused), ("bias", bias)], views=views, **options)
    apart = KINDS[kind](blocks + pieces, **options)
    for step in range(20):
        gradient = torch.randn(14, 6, generator=generator(step), dtype=torch.float64)
        fused.grad, bias.grad = gradient[:, :5].contiguous(), gradient[:, 5].contiguous()
        for whole, parts in ((fused, blocks), (bias, pieces)):
            for part, grad in zip(parts, whole.grad.split(sizes), strict=True):
                part.grad = grad.contiguous()
        together.step()
        apart.step()
    for whole, parts in ((fused, blocks), (bias, pieces)):
        assert torch.allclose(whole, torch.cat(parts), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="qkv"):
        KINDS[kind]([("qkv", fused)], views={"qkv": steepest.views.rows(4, 4)})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact(kind, dtype, options):
    params, whole = make(kind, dtype=dtype, **options)
    train(params, whole, range(12))
    first, stopped = make(kind, dtype=dtype, **options)
    train(first, stopped, range(6))
    file = io.BytesIO()
    torch.save({"params": first, "optimizer": stopped.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = [torch.nn.Parameter(param.detach().clone()) for param in saved["params"]]
    resumed = KINDS[kind](second, lr=0.5)
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, range(6, 12))
    assert all(torch.equal(a, b) for a, b in zip(params, second, strict=True))
    same_state(whole, resumed)


@pytest.mark.parametrize("kind", KINDS)
def test_resume_with_factors_narrower_than_the_parameter(kind):
    params, optimizer = make(kind, dtype=torch.float32)
    other, low = make(kind, dtype=torch.float32)
    for each in (optimizer, low):
        each.param_groups[0]["dtype"] = torch.bfloat16
    train(params, optimizer, range(4))
    train(other, low, range(2))
    again = copy.deepcopy(other)
    resumed = KINDS[kind](again)
    resumed.load_state_dict(low.state_dict())
    assert resumed.state[again[0]]["Q_left"].dtype == torch.bfloat16
    train(again, resumed, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_another_shape_is_refused(kind):
    _, optimizer = make(kind, [(6, 6)])
    train(optimizer.param_groups[0]["params"], optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["Q_left"] = torch.eye(5)
    with pytest.raises(ValueError, match="Q_left"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_agree_and_global_generator_is_unused(kind):
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        params, optimizer = make(kind, noise_scale=0.1)
        train(params, optimizer, range(5))
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    params, optimizer = make(kind, noise_scale=0.1, seed=1)
    train(params, optimizer, range(5))
    assert not torch.equal(params[0], runs[0][0])


# -- fitting less often


def test_schedule():
    """Fit in each of the first steps, then at a rate of exp(−τ/1000) down to 0.03, every 33rd step or so."""
    fits = [fits_in(t, 0.03, 1000, 1000) for t in range(1, 20001)]
    assert all(fits[:1000])
    expected = 1000 * (1 - math.exp(-1))
    assert sum(fits[1000:2000]) == pytest.approx(expected, abs=1)
    assert sum(fits[10000:20000]) == pytest.approx(300, abs=1)
    steps = [t for t, fit in enumerate(fits) if fit]
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert max(gaps) == 34
    assert all(fits_in(t, 1.0, 0, 0) for t in range(1, 50))
    assert [t for t in range(1, 13) if fits_in(t, 0.25, 0, 0)] == [4, 8, 12]
    assert [bool(fits_in(torch.tensor(float(t)), 0.03, 1000, 1000)) for t in range(990, 1300)] == fits[
        989:1299
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_factors_do_not_change_between_fits(kind):
    options = {"update_probability": 0.25, "update_flat_steps": 4, "update_decay_steps": 0}
    params, optimizer = make(kind, [(6, 6)], **options)
    moved = []
    for step in range(12):
        before = optimizer.state[params[0]].get("Q_left", torch.eye(6)).clone()
        train(params, optimizer, [step])
        moved.append(not torch.equal(before, optimizer.state[params[0]]["Q_left"]))
    assert [step + 1 for step, fit in enumerate(moved) if fit] == [1, 2, 3, 4, 8, 12]


@pytest.mark.parametrize("views", [None, {"0": steepest.views.rows(6, 6)}], ids=["whole", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_preconditioners_cannot_be_asked_for_after_the_first_step(kind, views):
    """P is dropped where every step computes it, so a stale one is never used; asking again is an error."""
    param = torch.nn.Parameter(torch.ones(12, 6, dtype=torch.float64))
    schedule = {"update_flat_steps": 0, "update_decay_steps": 0, "noise_scale": 0.0, "views": views}
    options = schedule | {"max_skew_dense": math.inf, "update_probability": 0.01}
    optimizer = KINDS[kind]([("0", param)], **options)
    train([param], optimizer, range(3))
    state = optimizer.state[param]
    sides = [name.removeprefix("Q") for name in state if name.startswith("Q")]
    assert all(f"P{side}" in state for side in sides)
    optimizer.param_groups[0]["update_probability"] = 1.0
    train([param], optimizer, range(3, 8))
    assert not any(name.startswith("P") for name in state)
    optimizer.param_groups[0]["update_probability"] = 0.01
    before = copy.deepcopy((param.detach(), dict(state)))
    with pytest.raises(ValueError, match=r"has no state 'P_left.* cannot change after the first step"):
        train([param], optimizer, [8])
    torch.testing.assert_close((param.detach(), dict(state)), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_step_counts_on_the_device(kind):
    """With step counts on the device, conditions become selections with the same results."""
    rule = steepest.rule.find_rule(kind)
    group = {**rule.defaults(), "update_probability": 0.5, "update_flat_steps": 0, "noise_scale": 0.0}
    hyper = {name: group[name] for name in rule.hyper}
    unseen = ("lr", "weight_decay", "views", "bucket_bytes")
    g = torch.randn(2, 6, 6, generator=generator(0))
    for step in (1, 2, 100):
        results = []
        for count in (step, torch.tensor(float(step), dtype=torch.float64)):
            specs = rule.matrix_specs((6, 6), torch.float32, group)
            state = {name: torch.stack([spec.make(g[0])] * 2) for name, spec in specs.items()}
            given = {**hyper, **rule.scalars(count, **hyper)}
            given = {name: value for name, value in given.items() if name not in unseen}
            results.append(
                rule.transform(
                    g.clone(), **state, **given,
                    key=(torch.zeros(2, 1, 1).long(), torch.ones(2, 1, 1).long()),
                    index=lambda: torch.arange(36).view(1, 6, 6), grad_dtype=g.dtype,
                )
            )  # fmt: skip
        (one, old), (other, new) = results
        assert torch.allclose(one, other, atol=1e-6)
        assert all(torch.allclose(old[name], new[name], atol=1e-6) for name in old)


# -- arguments


@for_each(
    "options",
    [
        {"lr": -1.0},
        {"lr_style": "sgd"},
        {"momentum": 1.0},
        {"max_size_dense": -1},
        {"max_skew_dense": -1.0},
        {"preconditioner_lr": 0.0},
        {"preconditioner_init_scale": 0.0},
        {"noise_scale": -1.0},
        {"dtype": torch.int32},
        {"dtype": torch.float8_e4m3fn},
        {"dtype": torch.float8_e5m2},
        {"update_probability": 0.0},
        {"update_probability": 1.1},
        {"update_flat_steps": -1},
        {"norm": "none"},
        {"whiten": "both"},
        {"literal": 1},
    ],
)
@for_each("kind", KINDS)
def test_values_out_of_range(kind, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        KINDS[kind]([torch.nn.Parameter(torch.zeros(2))], **options)


def test_unknown_keyword():
    with pytest.raises(TypeError, match="preconditioner_lr"):
        steepest.QUAD([torch.nn.Parameter(torch.zeros(2))], preconditioner_Lr=0.1)


@pytest.mark.parametrize("name", ["quad", "procrustes"])
def test_a_float64_factor_of_a_float32_parameter_keeps_its_bits(name):
    draw = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 6, generator=draw))
    options = {"update_probability": 0.25, "update_flat_steps": 4, "update_decay_steps": 0}
    optimizer = steepest.create(name, [weight], dtype=torch.float64, **options)
    for _ in range(5):
        before = {k: v.clone() for k, v in optimizer.state[weight].items() if k.startswith("Q")}
        weight.grad = torch.randn(6, 6, generator=draw)
        optimizer.step()
    after = optimizer.state[weight]  # no fit in the fifth step
    for key, value in before.items():
        assert value.dtype == torch.float64
        assert torch.equal(after[key], value)
        assert not torch.equal(value, value.float().double())


@pytest.mark.parametrize("kind", KINDS)
def test_balancing_by_a_condition_on_the_host_or_device(kind):
    """A true condition gives largest magnitudes of 1 and the same P; a false one changes nothing."""
    rule, draw = find_rule(kind), torch.Generator().manual_seed(0)
    left, right = 8 * torch.rand(2, 3, 3, generator=draw), torch.rand(2, 4, generator=draw) / 16
    scale = torch.tensor([1.0, 3.0])
    p = rule.metric(left, literal=False)
    sides = [Side("_left", left, p, torch.zeros(2)), Side("_right", right, right * right, torch.zeros(2))]

    def product(sides, scale):
        return scale.view(2, 1, 1, 1) ** 4 * sides[0].p.unsqueeze(-1) * sides[1].p.view(2, 1, 1, 4)

    for condition in (True, torch.tensor(True)):
        even, new = balanced(sides, scale, condition)
        for side in even:
            torch.testing.assert_close(side.q.flatten(1).amax(1), torch.ones(2))
        torch.testing.assert_close(product(even, new), product(sides, scale))
    same, kept = balanced(sides, scale, torch.tensor(False))
    assert torch.equal(kept, scale)
    assert all(torch.equal(one.q, other.q) for one, other in zip(same, sides, strict=True))
