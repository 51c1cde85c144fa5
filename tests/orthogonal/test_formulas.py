"""Test Muon and related rules against float64 references with the exact polar factor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import steepest
from loops import for_each

from . import reference

SHAPES = [(6, 6), (9, 4), (3, 8), (1, 5), (5, 1)]


def trained(name, start, gradients, **hyper):
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = steepest.create(name, [weight], method="svd", **hyper)
    for gradient in gradients:
        weight.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    return weight.detach().numpy()


def problem(shape, seed=0, steps=12):
    draw = np.random.default_rng(seed)
    return draw.normal(size=shape), [draw.normal(size=shape) for _ in range(steps)]


@for_each("shape", SHAPES)
@for_each("scale", sorted(reference.SCALES))
@for_each("nesterov", [True, False])
def test_muon(shape, scale, nesterov):
    start, gradients = problem(shape)
    hyper = {"lr": 0.03, "nesterov": nesterov, "scale": scale}
    ours = trained("muon", start, gradients, weight_decay=0.1, extra_scale=0.7, **hyper)
    theirs = reference.muon(start, gradients, decay=0.1, extra=0.7, **hyper)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11)


@for_each("shape", SHAPES)
@for_each(
    ("name", "hyper"),
    [
        ("normuon", {"beta2": 0.9}),
        ("polargrad", {}),
        ("scion", {"radius": 3.0}),
        ("hyperball", {}),
        ("hyperball", {"radius": 2.5}),
    ],
)
def test_rules_related_to_muon(shape, name, hyper):
    start, gradients = problem(shape, seed=1)
    plain = {} if name in ("scion", "hyperball") else {"weight_decay": 0.0}
    ours = trained(name, start, gradients, lr=0.03, **hyper, **plain)
    theirs = getattr(reference, name)(start, gradients, lr=0.03, **hyper)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["muon", "polargrad", "scion"])
def test_an_extra_scale_acts_once(name):
    """As the learning rate does where nothing decays."""
    start, gradients = problem((4, 3))
    once = trained(name, start, gradients, lr=0.01, weight_decay=0.0)
    told = trained(name, start, gradients, lr=0.02, extra_scale=0.5, weight_decay=0.0)
    np.testing.assert_allclose(told, once, rtol=0, atol=1e-12)
    still = trained(name, start, gradients, lr=0.01, extra_scale=0.0, weight_decay=0.0)
    np.testing.assert_array_equal(still, start)


def test_scion_stays_in_its_ball():
    """Each step is a convex combination of points in the ball."""
    start, gradients = problem((4, 4), steps=60)
    start = start / np.linalg.norm(start, 2)
    for count in range(1, 60, 7):
        weight = trained("scion", start, gradients[:count], lr=0.2, radius=1.0)
        assert np.linalg.norm(weight, 2) <= 1 + 1e-12


def test_hyperball_keeps_the_norm_of_every_matrix_of_a_batch():
    draw = torch.Generator().manual_seed(0)
    experts = torch.nn.Parameter(torch.randn(3, 4, 5, generator=draw, dtype=torch.float64))
    before = torch.linalg.matrix_norm(experts.detach())
    optimizer = steepest.Hyperball([experts], lr=0.1, view="batch")
    for _ in range(5):
        experts.grad = torch.randn(3, 4, 5, generator=draw, dtype=torch.float64)
        optimizer.step()
    torch.testing.assert_close(torch.linalg.matrix_norm(experts.detach()), before, rtol=1e-12, atol=0)


def test_hyperball_refuses_a_zero_matrix_by_name():
    with pytest.raises(ValueError, match="'out' is zero"):
        steepest.Hyperball([("out", torch.nn.Parameter(torch.zeros(3, 3)))])
    steepest.Hyperball([("out", torch.nn.Parameter(torch.zeros(3, 3)))], radius=1.0)
    with pytest.raises(ValueError, match="weight_decay"):
        steepest.create("hyperball", [torch.nn.Parameter(torch.ones(3, 3))], weight_decay=0.1)


def test_normuon_moves_every_row_equally_and_muon_does_not():
    start, gradients = problem((12, 3), steps=1)
    moved = trained("normuon", np.zeros_like(start), gradients, lr=1.0, weight_decay=0.0)
    rows = np.linalg.norm(moved, axis=1)
    np.testing.assert_allclose(rows, rows.mean(), rtol=1e-6)
    plain = np.linalg.norm(trained("muon", np.zeros_like(start), gradients, lr=1.0), axis=1)
    assert plain.max() / plain.min() > 1.5
    np.testing.assert_allclose(np.linalg.norm(moved), np.linalg.norm(plain), rtol=1e-6)


@pytest.mark.parametrize("name", ["muon", "normuon", "polargrad", "hyperball"])
def test_zero_gradients_move_nothing(name):
    start, _ = problem((4, 3))
    zeros = [np.zeros_like(start)] * 3
    extra = {} if name == "hyperball" else {"weight_decay": 0.0}
    np.testing.assert_allclose(trained(name, start, zeros, lr=0.1, **extra), start, rtol=1e-15)
