"""Test what could corrupt the factors: low precision, dead rows, bursts, NaN, zeros, late gradients."""

from __future__ import annotations

import pytest
import torch

from .fitting import KINDS, generator

LOW = [torch.bfloat16, torch.float16]


def all_finite(optimizer, params):
    entries = [value for state in optimizer.state.values() for value in state.values()]
    return all(bool(t.isfinite().all()) for t in [*params, *entries])


def rms(x):
    return x.detach().double().square().mean().sqrt().item()


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("how", ["parameter", "algebra"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dead_rows(kind, dtype, how, size):
    """Some rows and elements never get a gradient, with low-precision parameters or low-precision algebra."""
    stored = dtype if how == "parameter" else torch.float32
    params = [torch.nn.Parameter(torch.zeros(s, dtype=stored)) for s in ((12, 12), (8, 24), (6,))]
    options = {} if how == "parameter" else {"dtype": dtype}
    optimizer = KINDS[kind](params, lr=1.0, lr_style=None, weight_decay=0.0, **options)
    draw = generator(0)
    for step in range(250):
        before = [param.detach().clone() for param in params]
        for param in params:
            gradient = size * torch.randn(param.shape, generator=draw)
            gradient[:3] = 0
            param.grad = gradient.to(stored)
        optimizer.step()
        if how == "algebra" and step > 100:
            assert all(0.05 < rms(p - b) < 1.12 for p, b in zip(params, before, strict=True))
    assert all_finite(optimizer, params)
    assert optimizer.state[params[0]]["Q_left"].dtype == dtype
    assert optimizer.state[params[0]]["L_left"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_recovery_from_a_spike(kind, dtype):
    """The clip bounds the update of a gradient 1e6 times as large, and later updates are white again."""
    param = torch.nn.Parameter(torch.zeros(10, 10))
    optimizer = KINDS[kind]([param], lr=1.0, lr_style=None, weight_decay=0.0, momentum=0.5, dtype=dtype)
    draw = generator(0)
    sizes = []
    for step in range(1000):
        before = param.detach().clone()
        param.grad = 1e-3 * torch.randn(10, 10, generator=draw) * (1e6 if step == 100 else 1)
        optimizer.step()
        sizes.append(rms(param - before))
    assert all_finite(optimizer, [param])
    assert max(sizes) < 1.1 + 1e-4
    usual = sum(sizes[50:100]) / 50
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
def test_scale_is_not_measured_from_nan(kind):
    """The scale stays unset until a gradient is finite."""
    param = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = KINDS[kind]([param])
    param.grad = torch.full((4, 4), float("nan"))
    optimizer.step()
    assert float(optimizer.state[param]["scale"]) == 0


@pytest.mark.parametrize("shape", [(5, 5), (3, 20), (7,)], ids=str)
@pytest.mark.parametrize("options", [{}, {"preconditioner_init_scale": 3.0}, {"literal": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_gradients_first(kind, options, shape):
    """Zero gradients move nothing and set no scale; the next step behaves like the first."""
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
    # η_p depends on the step count, which is three ahead: this changes the moves of Q by 0.7·1.5e-4.
    assert (runs[0] - runs[1]).abs().max() < 1e-6
    assert (runs[0] - 1).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_stop(kind):
    """In a dead layer, momentum decays through the range of float32 without NaN, and the layer recovers."""
    for noise_scale in (0.0, 1e-9):
        param = torch.nn.Parameter(torch.zeros(6, 6))
        optimizer = KINDS[kind]([param], lr=1e-3, momentum=0.5, noise_scale=noise_scale)
        draw = generator(0)
        for step in range(500):
            alive = step < 50 or step >= 450
            param.grad = torch.randn(6, 6, generator=draw) * alive
            optimizer.step()
        assert all_finite(optimizer, [param])
        before = param.detach().clone()
        optimizer.step()
        assert rms(param - before) < 1e-3 * 0.25


@pytest.mark.parametrize("kind", KINDS)
def test_late_gradients(kind):
    """A parameter with a late first gradient measures its own scale then, independent of the others."""
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
@pytest.mark.parametrize("shape", [(5, 5), (3, 40), (12,)], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e-20, 1e-15, 1e15, 1e20, 1e25, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_sizes(kind, size, shape, noise_scale):
    """Updates are white from the first step, and Q is fitted, even if squared gradients overflow float32."""
    if noise_scale > size:
        noise_scale = 1e-9 * size
    param = torch.nn.Parameter(torch.zeros(shape))
    optimizer = KINDS[kind](
        [param], lr=1.0, lr_style=None, weight_decay=0.0, noise_scale=noise_scale, momentum=0.5
    )
    draw = generator(0)
    for step in range(100):
        before = param.detach().clone()
        param.grad = size * torch.randn(shape, generator=draw)
        optimizer.step()
        update = rms(param - before)
        assert 0.1 < update < 1.1 + 1e-4
        if step == 0:
            measured = optimizer.state[param]["scale"].double().item() ** (4 if len(shape) == 2 else 2)
            assert measured == pytest.approx(1 / rms(param.grad), rel=1e-4)
    assert all_finite(optimizer, [param])
    assert all(float(v) > 0 for name, v in optimizer.state[param].items() if name.startswith("L"))


@pytest.mark.parametrize("size", [1e20, 1e25, 1e30, 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 5), (3, 40), (12,)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_burst_whose_square_overflows(kind, shape, dtype, size):
    """A huge finite gradient, first or later, is clipped and leaves all state finite."""
    for at in (20, 0):
        param = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        optimizer = KINDS[kind]([param], lr=1.0, lr_style=None, weight_decay=0.0, nonfinite="skip")
        draw = generator(0)
        for step in range(60):
            before = param.detach().clone()
            gradient = torch.randn(shape, generator=draw).clamp(-2, 2)
            param.grad = (gradient * (size if step == at else 1)).to(dtype)
            optimizer.step()
            assert all_finite(optimizer, [param])
            if step == at:
                assert 0.5 < rms(param - before) < 1.12
        assert optimizer.skipped_steps == 0
        assert float(optimizer.state[param]["scale"]) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_from_one_end_of_the_range_to_the_other(kind):
    """The measured scale stays wrong by 1e60, beyond float32; updates stay at or below the clip."""
    for first, then in ((1e-30, 1e30), (1e30, 1e-30)):
        param = torch.nn.Parameter(torch.zeros(6, 6))
        optimizer = KINDS[kind]([param], lr=1.0, lr_style=None, weight_decay=0.0, noise_scale=0.0)
        draw = generator(0)
        for step in range(250):
            before = param.detach().clone()
            param.grad = (first if step < 5 else then) * torch.randn(6, 6, generator=draw)
            optimizer.step()
            assert rms(param - before) < 1.1 + 1e-4
        assert all_finite(optimizer, [param])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("first", "then"), [(1e5, 1.0), (1e6, 1.0), (1e8, 1.0), (1.0, 1e-9), (1e3, 1e-9), (1e4, 1e-6)]
)
@pytest.mark.parametrize("shape", [(12, 12), (8, 24)])
def test_float16_algebra_survives_falling_gradients(kind, first, then, shape):
    """Gradients fall by 1e5 after one step or by 1e12 after twenty; all state must stay finite."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(shape))
    optimizer = KINDS[kind]([weight], lr_style=None, dtype=torch.float16, momentum=0.5)
    falls = 1 if then == 1.0 else 20
    for step in range(80):
        weight.grad = torch.randn(shape, generator=draw) * (first if step < falls else then)
        optimizer.step()
        assert all_finite(optimizer, [weight]), step
