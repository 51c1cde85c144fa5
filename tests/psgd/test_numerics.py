"""What could poison the factors: low precision, dead rows, bursts, NaN, zeros, gradients that come late.

Tensors of one optimizer do not see one another, so that many of them share a run: each with gradients of its
own size, stacked by shape.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from loops import for_each

from .fitting import KINDS, generator

LOW = [torch.bfloat16, torch.float16]


def all_finite(optimizer, params):
    entries = [value for param in params for value in optimizer.state[param].values()]
    return bool(torch.cat([t.detach().flatten() for t in [*params, *entries]]).isfinite().all())


def rms(x):
    return x.detach().double().square().mean().sqrt().item()


@pytest.mark.parametrize("how", ["parameter", "algebra"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dead_rows(kind, dtype, how):
    """Rows and elements without any gradient, in the parameter's low precision or in the algebra's alone."""
    stored = dtype if how == "parameter" else torch.float32
    cases = list(itertools.product([(12, 12), (8, 24), (6,)], [1e-6, 1e-3, 1.0]))
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=stored)) for shape, _ in cases]
    options = {} if how == "parameter" else {"dtype": dtype}
    optimizer = KINDS[kind](params, lr=1.0, lr_style=None, weight_decay=0.0, **options)
    draw = generator(0)
    for step in range(110):
        before = [param.detach().clone() for param in params]
        for param, (shape, size) in zip(params, cases, strict=True):
            gradient = size * torch.randn(shape, generator=draw)
            gradient[:3] = 0
            param.grad = gradient.to(stored)
        optimizer.step()
        if how == "algebra" and step > 80:
            for param, old, case in zip(params, before, cases, strict=True):
                assert 0.05 < rms(param - old) < 1.12, case
    assert all_finite(optimizer, params)
    assert optimizer.state[params[0]]["Q_left"].dtype == dtype
    assert optimizer.state[params[0]]["L_left"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_recovery_from_a_spike(kind, dtype):
    """A gradient 1e6 times as large: bounded at once by the clip, and white again 550 steps later.

    Nothing happens in most of them: L, 1e12 too large, falls by 5 % a step and holds Q where it is. They are
    taken at once.
    """
    param = torch.nn.Parameter(torch.zeros(10, 10))
    optimizer = KINDS[kind]([param], lr=1.0, lr_style=None, weight_decay=0.0, momentum=0.5, dtype=dtype)
    draw = generator(0)
    sizes = []
    for step in range(250):
        if step == 80:
            bounds = [optimizer.state[param][name] for name in ("L_left", "L_right")]
            assert all(1e10 < float(bound) < 1e14 for bound in bounds)
            torch._foreach_mul_(bounds, 0.95**410)
        before = param.detach().clone()
        param.grad = 1e-3 * torch.randn(10, 10, generator=draw) * (1e6 if step == 60 else 1)
        optimizer.step()
        sizes.append(rms(param - before))
    assert all_finite(optimizer, [param])
    assert max(sizes) < 1.1 + 1e-4
    usual = sum(sizes[30:60]) / 30
    assert sum(sizes[-50:]) / 50 == pytest.approx(usual, rel=0.1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_skipped_gradients_leave_no_trace(kind, bad):
    runs = []
    for poisoned in (False, True):
        params = [torch.nn.Parameter(torch.ones(s)) for s in ((5, 5), (3,))]
        optimizer = KINDS[kind](params, nonfinite="skip")
        draw = generator(0)
        for _ in range(20):
            for param in params:
                param.grad = torch.randn(param.shape, generator=draw)
            optimizer.step()
            if poisoned:
                params[0].grad[1, 2] = bad
                optimizer.step()
        runs.append((optimizer, params))
    (clean, ours), (dirty, theirs) = runs
    assert dirty.skipped_steps == 20
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        for name, value in clean.state[a].items():
            assert torch.equal(value, dirty.state[b][name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_nan_is_not_measured(kind):
    """The scale waits for a gradient that has one."""
    param = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = KINDS[kind]([param])
    param.grad = torch.full((4, 4), float("nan"))
    optimizer.step()
    assert float(optimizer.state[param]["scale"]) == 0


@for_each("shape", [(5, 5), (3, 20), (7,)])
@for_each("options", [{}, {"preconditioner_init_scale": 3.0}, {"literal": True}])
@for_each("kind", KINDS)
def test_zero_gradients_first(kind, options, shape):
    """Nothing moves, nothing is measured, and what follows is as if it were the first step."""
    runs = []
    for zeros in (0, 3):
        param = torch.nn.Parameter(torch.ones(shape, dtype=torch.float64))
        optimizer = KINDS[kind]([param], weight_decay=0.0, noise_scale=0.0, norm="exact", **options)
        for _ in range(zeros):
            param.grad = torch.zeros_like(param)
            optimizer.step()
            assert torch.equal(param.detach(), torch.ones_like(param))
            assert float(optimizer.state[param]["scale"]) == 0
        draw = generator(0)
        for _ in range(5):
            param.grad = 1e-3 * torch.randn(shape, generator=draw, dtype=torch.float64)
            optimizer.step()
        assert float(optimizer.state[param]["scale"]) > 0
        runs.append(param.detach())
    # η_p follows the step count, which is three ahead: 0.7·1.5e-4 of what Q moves.
    assert (runs[0] - runs[1]).abs().max() < 1e-6
    assert (runs[0] - 1).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_stop(kind):
    """A layer that dies: its momentum fades through all of float32 without a NaN, and it comes back."""
    for noise_scale in (0.0, 1e-9):
        param = torch.nn.Parameter(torch.zeros(6, 6))
        optimizer = KINDS[kind]([param], lr=1e-3, momentum=0.5, noise_scale=noise_scale)
        draw = generator(0)
        for step in range(220):
            alive = step < 20 or step >= 180
            param.grad = torch.randn(6, 6, generator=draw) * alive
            optimizer.step()
        assert all_finite(optimizer, [param])
        before = param.detach().clone()
        optimizer.step()
        assert rms(param - before) < 1e-3 * 0.25


@pytest.mark.parametrize("kind", KINDS)
def test_late_gradients(kind):
    """A parameter whose gradient comes later measures its own scale then, whatever the others do."""
    early, late, never = (torch.nn.Parameter(torch.zeros(6, 6)) for _ in range(3))
    optimizer = KINDS[kind](
        [{"params": [early, late]}, {"params": [never]}], lr=1.0, lr_style=None, weight_decay=0.0
    )
    draw = generator(0)
    for step in range(20):
        early.grad = torch.randn(6, 6, generator=draw)
        if step == 10:
            late.grad = 1e-5 * torch.randn(6, 6, generator=draw)
        optimizer.step()
        if step == 10:
            assert 0.3 < rms(late) < 1.11
    assert never not in optimizer.state
    assert int(optimizer.state[late]["step"]) == 10
    assert all_finite(optimizer, [early, late])


@pytest.mark.parametrize("noise_scale", [0.0, 1e-9])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_sizes(kind, noise_scale):
    """Gradients whose squares float32 cannot hold are white from the first step on, and Q is fitted."""
    sizes = [1e-30, 1e-20, 1e-15, 1e15, 1e20, 1e30]
    cases, groups = [], {}
    for size, shape in itertools.product(sizes, [(5, 5), (3, 40), (12,)]):
        param = torch.nn.Parameter(torch.zeros(shape))
        cases.append((size, param))
        groups.setdefault(min(noise_scale, 1e-9 * size), []).append(param)
    optimizer = KINDS[kind](
        [{"params": params, "noise_scale": noise} for noise, params in groups.items()],
        lr=1.0, lr_style=None, weight_decay=0.0, momentum=0.5,
    )  # fmt: skip
    draw = generator(0)
    for step in range(60):
        before = [param.detach().clone() for _, param in cases]
        for size, param in cases:
            param.grad = size * torch.randn(param.shape, generator=draw)
        optimizer.step()
        for (size, param), old in zip(cases, before, strict=True):
            assert 0.1 < rms(param - old) < 1.1 + 1e-4, (size, param.shape)
            if step == 0:
                power = 4 if param.dim() == 2 else 2
                measured = optimizer.state[param]["scale"].double().item() ** power
                assert measured == pytest.approx(1 / rms(param.grad), rel=1e-4)
    assert all_finite(optimizer, [param for _, param in cases])
    for _, param in cases:
        assert all(float(v) > 0 for name, v in optimizer.state[param].items() if name.startswith("L"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_burst_whose_square_is_no_number(kind, dtype):
    """One finite gradient among usual ones, or the first: clipped, and nothing is poisoned."""
    cases = list(itertools.product([(5, 5), (3, 40), (12,)], [1e20, 1e25, 1e30, 1e38], [20, 0]))
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, _, _ in cases]
    optimizer = KINDS[kind](params, lr=1.0, lr_style=None, weight_decay=0.0, nonfinite="skip")
    draw = generator(0)
    for step in range(60):
        before = [param.detach().clone() for param in params]
        for param, (shape, size, at) in zip(params, cases, strict=True):
            gradient = torch.randn(shape, generator=draw).clamp(-2, 2)
            param.grad = (gradient * (size if step == at else 1)).to(dtype)
        optimizer.step()
        assert all_finite(optimizer, params), step
        for param, old, (_, size, at) in zip(params, before, cases, strict=True):
            if step == at:
                assert 0.5 < rms(param - old) < 1.12, (param.shape, size)
    assert optimizer.skipped_steps == 0
    assert all(float(optimizer.state[param]["scale"]) > 0 for param in params)


@pytest.mark.parametrize("kind", KINDS)
def test_from_one_end_of_the_range_to_the_other(kind):
    """The measured scale is wrong by 1e60 for good, which no float32 holds: clipped or below."""
    up, down = params = [torch.nn.Parameter(torch.zeros(6, 6)) for _ in range(2)]
    optimizer = KINDS[kind](params, lr=1.0, lr_style=None, weight_decay=0.0, noise_scale=0.0)
    draw = generator(0)
    for step in range(180):
        before = [param.detach().clone() for param in params]
        up.grad = (1e-30 if step < 5 else 1e30) * torch.randn(6, 6, generator=draw)
        down.grad = (1e30 if step < 5 else 1e-30) * torch.randn(6, 6, generator=draw)
        optimizer.step()
        assert all(rms(param - old) < 1.1 + 1e-4 for param, old in zip(params, before, strict=True))
    assert all_finite(optimizer, params)


@pytest.mark.parametrize("kind", KINDS)
def test_float16_algebra_survives_gradients_that_fall(kind):
    """By 1e5 after one step, by 1e12 after twenty: nothing may stop being a number."""
    falls = [(1e5, 1.0), (1e6, 1.0), (1e8, 1.0), (1.0, 1e-9), (1e3, 1e-9), (1e4, 1e-6)]
    cases = list(itertools.product([(12, 12), (8, 24)], falls))
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape, _ in cases]
    optimizer = KINDS[kind](weights, lr_style=None, dtype=torch.float16, momentum=0.5)
    draw = generator(0)
    for step in range(80):
        for weight, (shape, (first, then)) in zip(weights, cases, strict=True):
            large = step < (1 if then == 1.0 else 20)
            weight.grad = torch.randn(shape, generator=draw) * (first if large else then)
        optimizer.step()
        assert all_finite(optimizer, weights), step


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_is_that_of_the_momentum_too(kind):
    """In bfloat16 an average stalls where its increments round to nothing; it takes two bytes a number."""
    reached = {}
    for dtype in (None, torch.float32):
        param = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.bfloat16))
        optimizer = KINDS[kind]([param], lr=0.0, momentum=0.9, dtype=dtype)
        for step in range(90):
            param.grad = torch.full_like(param, 1.0 if step else 0.5)
            optimizer.step()
        reached[dtype] = optimizer.state[param]["momentum_buffer"].float().mean().item()
    assert reached[torch.float32] == pytest.approx(1.0, abs=1e-4)
    assert reached[None] < 0.99
    wide = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = KINDS[kind]([wide], dtype=torch.bfloat16)
    wide.grad = torch.ones(64, 64)
    optimizer.step()
    assert 6 * 64 * 64 <= optimizer.state_bytes() <= 6 * 64 * 64 + 24


@pytest.mark.parametrize("size", [0.0, 1e-33, float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_fitted_to_a_gradient_that_says_nothing(kind, size):
    """Q would grow on zeros and on values that underflow when squared, and become NaN on infinity."""
    param = torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = KINDS[kind]([param], whiten="gradient", weight_decay=0.0)
    draw = generator(0)
    for _ in range(5):
        param.grad = torch.randn(6, 4, generator=draw)
        optimizer.step()
    names = ("Q_left", "L_left", "Q_right", "L_right")
    before = {name: optimizer.state[param][name].clone() for name in names}
    param.grad = torch.full((6, 4), size)
    optimizer.step()
    for name in names:
        assert optimizer.state[param][name].equal(before[name]), name
