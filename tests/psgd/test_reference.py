"""Compare parameters, factors and bounds after each step with the same equations in numpy, in float64."""

from __future__ import annotations

import pytest
import torch

from reference.psgd import PSGD
from steepest.rules.psgd import fits_in, sides_of
from steepest.rules.psgd import rule as psgd_rule
from steepest.views import merged_shape

from .fitting import KINDS, factors, gaussian, relative

BALANCE_EVERY = 40  # instead of 100, which test_symmetries.py counts, so that fewer steps pass one or two
STEPS = 65

# Factors from before the burst whiten it, so the rounding error of 1e-16 per step is amplified once.
TOLERANCE = 1e-10

SHAPES = [(6, 6), (4, 9), (9, 4), (3, 40), (5,), (), (1, 7), (2, 3, 4), (4, 3, 3, 3)]


@pytest.fixture(autouse=True)
def _balanced_earlier(monkeypatch):
    monkeypatch.setattr(psgd_rule, "_BALANCE_EVERY", BALANCE_EVERY)


def gradients(shape, steps=STEPS):
    """Yield gradients over two orders of magnitude, with a burst in step 30 and zero in step 60."""
    size = torch.logspace(-3, -1, max(1, torch.Size(shape).numel()), dtype=torch.float64).reshape(shape)
    for t in range(1, steps + 1):
        yield {30: 10.0, 60: 0.0}.get(t, 1.0) * size * gaussian(*shape, seed=t)


def follow(kind, shape, *, steps=STEPS, reference=None, **options):
    """Return the largest relative difference of parameter, factors and bounds over all steps."""
    begin = gaussian(*shape, seed=1000)
    param = torch.nn.Parameter(begin.clone())
    optimizer = KINDS[kind]([param], lr=0.01, noise_scale=0.0, norm="exact", **options)
    known = {name: value for name, value in options.items() if not name.startswith("update_")}
    known |= {"balance_every": BALANCE_EVERY, **(reference or {})}
    expected = PSGD(kind, begin.numpy(), lr=0.01, **known)
    worst = 0.0
    for gradient in gradients(shape, steps):
        param.grad = gradient
        optimizer.step()
        expected.step(gradient.numpy())
        pairs = [(param.detach(), expected.p)]
        ours, theirs = factors(optimizer, param), expected.q
        if len(ours) == 2:
            ours, theirs = one_sided(ours), one_sided([torch.as_tensor(q) for q in theirs])
        pairs += zip(ours, theirs, strict=True)
        pairs += zip(bounds(optimizer, param), expected.bounds, strict=True)
        worst = max(worst, *(relative(one, torch.as_tensor(other)) for one, other in pairs))
    return worst


def bounds(optimizer, param):
    """Return L of each side."""
    state = optimizer.state[param]
    return [state[name] for name in ("L", "L_left", "L_right") if name in state]


def one_sided(q):
    """Move the scale of both factors to the left one; their product does not change."""
    largest = q[1].abs().max()
    return [q[0] * largest, q[1] / largest]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_shape(kind, shape):
    assert follow(kind, shape) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"max_skew_dense": float("inf")},
        {"max_skew_dense": 0.0},
        {"max_size_dense": 4},
        {"whiten": "gradient"},
        {"literal": True},
        {"literal": True, "preconditioner_lr": 0.1},
        {"momentum": 0.5, "preconditioner_lr": 0.1, "weight_decay": 0.0},
        {"lr_style": None, "preconditioner_init_scale": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_option(kind, options):
    assert follow(kind, (4, 9), **options) < TOLERANCE


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 90),
        ({"max_size_dense": 3}, 65),
        ({"lr_style": None, "momentum": 0.5, "preconditioner_init_scale": 1.3}, 65),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_literal_in_one_group(kind, options, steps):
    """All shapes start from the group's largest gradient and step through a balancing or two."""
    begin = [gaussian(*shape, seed=1000 + i) for i, shape in enumerate(SHAPES)]
    params = [torch.nn.Parameter(p.clone()) for p in begin]
    optimizer = KINDS[kind](params, lr=0.01, noise_scale=0.0, norm="exact", literal=True, **options)
    known = {"literal": True, "balance_every": BALANCE_EVERY, **options}
    expected = [PSGD(kind, p.numpy(), lr=0.01, **known) for p in begin]
    worst = [0.0, 0.0]
    for step, drawn in enumerate(zip(*(gradients(shape, steps) for shape in SHAPES), strict=True)):
        # The first gradient is the largest; the one in step 60 has another direction and a tenth of the size.
        drawn = [2.0**-i * (g if step != 59 else 0.1 * begin[i]) for i, g in enumerate(drawn)]
        largest = max(float(g.square().mean()) for g in drawn)
        for param, reference, g in zip(params, expected, drawn, strict=True):
            param.grad = g
            reference.step(g.numpy(), largest)
        optimizer.step()
        for param, reference in zip(params, expected, strict=True):
            worst[0] = max(worst[0], relative(param.detach(), torch.as_tensor(reference.p)))
            for bound, known in zip(bounds(optimizer, param), reference.bounds, strict=True):
                worst[1] = max(worst[1], relative(bound, torch.as_tensor(known)))
    # Bounds are of fourth degree in Q, and no clip hides their rounding errors.
    assert worst[0] < TOLERANCE
    assert worst[1] < 100 * TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_occasionally(kind):
    """Between fits, steps use the P stored at the last fit."""
    schedule = {"update_probability": 0.1, "update_flat_steps": 10, "update_decay_steps": 20}
    fits = {"fits": lambda t: fits_in(t, 0.1, 10, 20)}
    assert follow(kind, (5, 6), max_skew_dense=float("inf"), reference=fits, **schedule) < TOLERANCE


def test_defaults_match_the_original():
    for cls in KINDS.values():
        group = cls([torch.nn.Parameter(torch.zeros(2, 2))]).param_groups[0]
        original = {
            "lr": 0.001,
            "lr_style": "adam",
            "momentum": 0.95,
            "weight_decay": 0.1,
            "max_size_dense": 16384,
            "max_skew_dense": 1.0,
            "preconditioner_lr": 0.7,
            "preconditioner_init_scale": None,
            "noise_scale": 1e-9,
            "dtype": None,
        }
        assert {name: group[name] for name in original} == original
        values = list(original.values())
        positional = cls([torch.nn.Parameter(torch.zeros(2, 2))], *values).param_groups[0]
        assert {name: positional[name] for name in original} == original


@pytest.mark.parametrize(
    ("shape", "merged"),
    [
        ((128, 64, 3, 3), (128, 576)),
        ((64, 3, 7, 7), (64, 147)),
        ((2, 8, 2), (2, 16)),
        ((5,), (5,)),
        ((), (1,)),
        ((1, 1), (1,)),
        ((7, 1), (7,)),
        ((1, 7, 1), (7,)),
        ((3, 5), (3, 5)),
        ((0, 4), (0, 4)),
        ((0,), (0,)),
        ((2, 0, 3), (0, 3)),
    ],
    ids=str,
)
def test_merged_shape(shape, merged):
    found = merged_shape(shape)
    assert torch.Size(found).numel() == torch.Size(shape).numel()
    if 0 not in shape:
        assert found == merged


@pytest.mark.parametrize(
    ("shape", "size", "skew", "dense"),
    [
        ((128, 128), 16384, 1.0, (True, True)),
        ((128, 1024), 16384, 1.0, (True, False)),
        ((1024, 128), 16384, 1.0, (False, True)),
        ((128, 1024), 16384, float("inf"), (True, True)),
        ((128, 1024), 16384, 8.0, (True, True)),
        ((128, 1024), 16384, 7.9, (True, False)),
        ((128, 128), 127, 1.0, (False, False)),
        ((128, 128), 128, 1.0, (True, True)),
        ((128, 128), 16384, 0.99, (False, False)),
    ],
    ids=str,
)
def test_which_sides_are_dense(shape, size, skew, dense):
    sides = sides_of(shape, size, skew)
    assert tuple(len(sides[name]) == 2 for name in ("_left", "_right")) == dense


def test_first_update_is_white_at_any_gradient_scale():
    """Each tensor measures its own s; the original's update is at its clip or far below it."""
    for size in (1e-12, 1e-6, 1e-3, 1.0, 1e3):
        rms = {}
        for literal in (False, True):
            params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((16, 16), (16,))]
            optimizer = KINDS["quad"](
                params, lr=1.0, lr_style=None, weight_decay=0.0, noise_scale=0.0,
                preconditioner_lr=1e-9, preconditioner_min_lr=1e-9, literal=literal,
            )  # fmt: skip
            for index, param in enumerate(params):
                param.grad = size * torch.randn(param.shape, generator=torch.Generator().manual_seed(index))
            optimizer.step()
            rms[literal] = [param.detach().square().mean().sqrt().item() for param in params]
        assert rms[False] == pytest.approx([1.0, 1.0], rel=1e-5)
        if size < 1:
            assert rms[True][0] == pytest.approx(1.1, rel=1e-5)
        if size > 1:
            assert rms[True][0] < 0.01


# The update's rms divided by 0.2, on independent Gaussian gradients. docs/psgd.md explains the numbers.
MATCHES_ADAMW = [
    ({}, (32, 96), 0.9, 1.1),
    ({}, (8, 3, 3, 3), 0.9, 1.1),
    ({"preconditioner_lr": 0.1}, (48, 48), 0.9, 1.1),
    ({"preconditioner_lr": 0.1}, (32, 96), 0.9, 1.1),
    ({"preconditioner_lr": 0.1}, (64,), 0.9, 1.1),
    # Square matrices and vectors stay below at μ₀ = 0.7, because Q is fitted to the sample that it whitens.
    ({}, (48, 48), 0.82, 0.88),
    ({"norm": "exact"}, (48, 48), 0.82, 0.88),
    ({}, (64,), 0.82, 0.95),
]


@pytest.mark.parametrize(("options", "shape", "low", "high"), MATCHES_ADAMW, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_update_has_the_rms_of_adamw(kind, options, shape, low, high):
    """lr_style="adam" promises rms 0.2, as AdamW's is."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(4)]
    optimizer = KINDS[kind](params, lr=1.0, weight_decay=0.0, **options)
    draw = torch.Generator().manual_seed(0)
    rms = []
    for step in range(130):
        before = [param.detach().clone() for param in params]
        for param in params:
            param.grad = 1e-3 * torch.randn(shape, generator=draw)
        optimizer.step()
        if step >= 100:
            moved = torch.stack(params).detach() - torch.stack(before)
            rms.append(float(moved.square().flatten(1).mean(1).sqrt().mean()))
    assert low < sum(rms) / len(rms) / 0.2 < high
