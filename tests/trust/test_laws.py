"""Each law fails for the fault that it is about: a rule with broken code, which a copy would repeat."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from steepest import VerificationError, verify
from steepest.rule import find_rule
from steepest.trust.laws.orthogonal import polar_band

from .training import rejected


def steps(
    name: str, shape: tuple[int, ...] = (8, 6), count: int = 3, **options: Any
) -> steepest.Verification:
    """Verified steps with random gradients of different scales."""
    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=draw))
    optimizer = steepest.create(name, {"w": weight}.items(), **{"lr": 0.1, **options})
    with verify(optimizer) as verification:
        for _ in range(count):
            weight.grad = torch.randn(shape, generator=draw) * torch.logspace(0, -3, shape[-1])
            optimizer.step()
    return verification


def mutate(monkeypatch: pytest.MonkeyPatch, name: str, method: str, change: Any) -> None:
    """Replace a rule's method by one that changes its result."""
    cls = type(find_rule(name))
    original = getattr(cls, method)
    monkeypatch.setattr(cls, method, lambda self, *a, **k: change(*original(self, *a, **k)))


@pytest.mark.parametrize("name", ["signgsd", "signum", "lion", "simba", "simba_leaky"])
@pytest.mark.parametrize("method", ["decoupled", "cautious", "sign", "palm", "l2"])
def test_a_sign_that_is_a_little_less(monkeypatch: pytest.MonkeyPatch, name: str, method: str):
    options = {"weight_decay": 0.1, "weight_decay_method": method}
    steps(name, **options)
    mutate(monkeypatch, name, "update", lambda u, new: (0.99 * u, new))
    with pytest.raises(VerificationError, match=f"'w', stepped by '{name}'.* moved by 0.99"):
        steps(name, **options)


def test_a_sign_that_is_zero_is_allowed_and_decay_that_is_not_taken_out_is_not():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = steepest.SignGSD({"w": weight}.items(), lr=0.1, weight_decay=0.5, decay_overshoot=True)
    with verify(optimizer):
        weight.grad = torch.tensor([1.0, 0.0])
        optimizer.step()
    optimizer.register_step_post_hook(lambda *_: weight.data.mul_(0.95))
    with rejected("'w', stepped by 'signgsd'", optimizer):
        optimizer.step()


@pytest.mark.parametrize("name", ["muon", "scion", "normuon", "polargrad"])
@pytest.mark.parametrize("method", ["newton_schulz", "svd"])
def test_orthogonalization_skipped_or_scaled(monkeypatch: pytest.MonkeyPatch, name: str, method: str):
    steps(name, method=method)
    module = sys.modules["steepest.rules.muon"]
    polar = module.scaled_polar
    monkeypatch.setattr(module, "scaled_polar", lambda u, **options: u)
    with pytest.raises(VerificationError, match=f"'w', stepped by '{name}'"):
        steps(name, method=method)
    monkeypatch.setattr(module, "scaled_polar", lambda u, **options: 0.3 * polar(u.clone(), **options))
    if name != "polargrad":  # a scale of O is a scale of ⟨O, u⟩: the law finds O by it
        with pytest.raises(VerificationError, match=f"'w', stepped by '{name}'"):
            steps(name, method=method)
    monkeypatch.setattr(module, "scaled_polar", lambda u, **options: 2 * polar(u.clone(), **options))
    with pytest.raises(VerificationError, match=f"'w', stepped by '{name}'"):
        steps(name, method=method)


def test_the_law_is_for_whole_matrices_or_for_the_views_blocks():
    class Halves(steepest.Muon):
        def orthogonalize(self, p, grad, **options):
            return torch.cat(
                [super(Halves, self).orthogonalize(p, half, **options) for half in grad.split(4)]
            )

    views = {"w": steepest.views.rows(4, 4)}
    for cls, options, laws in (
        (steepest.Muon, {"views": views}, None),
        (Halves, {"scale": "none"}, {"muon": None}),
        (Halves, {"scale": "none"}, None),
    ):
        weight = nn.Parameter(torch.zeros(8, 6))
        optimizer = cls({"w": weight}.items(), lr=0.1, method="svd", **options)
        weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).repeat(2, 1)
        if cls is steepest.Muon or laws:
            with verify(optimizer, laws=laws):
                optimizer.step()
        else:
            with rejected(r"must be ≤ 1.02.*; the largest is 1.414", optimizer):
                optimizer.step()


def test_hyperballs_norm_and_angle(monkeypatch: pytest.MonkeyPatch):
    steps("hyperball")
    mutate(monkeypatch, "hyperball", "finish", lambda u, new: (1.5 * u, new))
    with pytest.raises(VerificationError, match="'w', stepped by 'hyperball': p must turn by at most"):
        steps("hyperball")
    monkeypatch.undo()
    monkeypatch.setattr(
        type(find_rule("hyperball")), "retract", lambda self, param, before, state: param * 1.0
    )
    with pytest.raises(VerificationError, match=r"'w', stepped by 'hyperball': ‖p‖ must be"):
        steps("hyperball")


@pytest.mark.parametrize("name", ["quad", "procrustes"])
def test_psgds_clip(monkeypatch: pytest.MonkeyPatch, name: str):
    for style, most in (("adam", "0.22"), (None, "1.1")):
        found = steps(name, lr_style=style).report["parameter 'w'"]
        assert found["update_rms"] <= float(most) * 1.001
        mutate(monkeypatch, name, "transform", lambda u, new: (20 * u, new))
        with pytest.raises(
            VerificationError, match=rf"'w', stepped by '{name}': rms\(Δp/lr\) must be ≤ {most},"
        ):
            steps(name, lr_style=style)
        monkeypatch.undo()


@pytest.mark.parametrize("name", ["quad", "procrustes"])
@pytest.mark.parametrize("shape", [(7,), (6, 6)])
@pytest.mark.parametrize("what", ["reset", "frozen", "turned away"])
def test_psgd_with_a_broken_preconditioner(
    monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int, ...], what: str
):
    rule = find_rule(name)
    original = type(rule).fit_dense, type(rule).fit_diagonal
    steps(name, shape, 8)

    def dense(self: Any, q: torch.Tensor, step: torch.Tensor, **norm: Any) -> torch.Tensor:
        if what == "turned away":
            return original[0](self, q, -step, **norm)
        return q if what == "frozen" else torch.eye(q.shape[-1]).expand_as(q).clone()

    def diagonal(self: Any, q: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        if what == "turned away":
            return original[1](self, q, -step)
        return q if what == "frozen" else torch.ones_like(q)

    monkeypatch.setattr(type(rule), "fit_dense", dense)
    monkeypatch.setattr(type(rule), "fit_diagonal", diagonal)
    with pytest.raises(VerificationError, match=f"'w', stepped by '{name}': the preconditioner makes"):
        steps(name, shape, 8)


def test_the_whitening_residual_falls_where_gradients_have_one_covariance():
    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(6, 6))
    optimizer = steepest.QUAD({"w": weight}.items(), momentum=0.0, preconditioner_lr=0.1)
    skew = torch.diag(torch.logspace(0, -0.7, 6))
    residuals = []
    for at in range(150):
        weight.grad = skew @ torch.linalg.qr(torch.randn(6, 6, generator=draw))[0]
        if at not in (0, 1, 149):
            optimizer.step()
            continue
        with verify(optimizer) as verification:
            optimizer.step()
        residuals.append(verification.report["parameter 'w'"].get("whitening_residual"))
    # Orthogonal gradients in one skewed frame can be whitened exactly; at first they are as skewed as that.
    assert residuals[0] is None
    assert residuals[1] > 0.5
    assert residuals[-1] < 0.05


def test_sgd_sais_constant_scale_and_momentum(monkeypatch: pytest.MonkeyPatch):
    rule = type(find_rule("sgd_sai"))
    update, measure = rule.update, rule.measure
    steps("sgd_sai")

    def momentum(
        self: Any, grad: Any, param: Any, momentum_buffer: Any = None, *, keep: Any, take: Any, gain: Any
    ):
        first = keep == 0
        return update(self, grad, param, momentum_buffer, keep=keep if first else 0.8, take=take, gain=gain)

    monkeypatch.setattr(rule, "update", momentum)
    with pytest.raises(VerificationError, match=r"'w', stepped by 'sgd_sai': m must move 0.1 of the way"):
        steps("sgd_sai")
    monkeypatch.setattr(rule, "update", update)
    mutate(monkeypatch, "sgd_sai", "update", lambda u, new: (1.01 * u, new))
    with pytest.raises(VerificationError, match="'w', stepped by 'sgd_sai': Δp must be lr·G·m"):
        steps("sgd_sai")
    monkeypatch.setattr(rule, "update", update)
    mutate(monkeypatch, "sgd_sai", "update", lambda u, new: (u + 0.01, new))
    with pytest.raises(
        VerificationError, match=r"'w', stepped by 'sgd_sai': .* the same number for all elements"
    ):
        steps("sgd_sai")
    monkeypatch.undo()

    def again(self: Any, moments: Any, state: Any, group: Any) -> Any:
        scalars, new = measure(self, moments, state, group)
        grown = float(new.get("gsnr", state["gsnr"])) * 1.5
        return {**scalars, "gain": grown}, {"gsnr": grown, "measured": 1.0}

    monkeypatch.setattr(rule, "measure", again)
    with pytest.raises(VerificationError, match=r"'w', stepped by 'sgd_sai': G = .* was measured, and is"):
        steps("sgd_sai")


def test_users_laws_replace_the_builtin_ones():
    weight = nn.Parameter(torch.ones(3))
    optimizer = steepest.AdamW({"w": weight}.items())
    weight.grad = torch.ones(3)
    with verify(optimizer, laws={"adamw": lambda step: None}):
        optimizer.step()
    with rejected(
        r"'w', stepped by 'adamw': 0\.00[0-9]+ is too much",
        optimizer,
        laws={"adamw": lambda step: f"{float(step.lr)} is too much"},
    ):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("jordan", 0.47, 1.20),
        ("quintic", 0.48, 1.15),
        ("polar_express", 0.85, 1.14),
        ("deepseekv4", 1.0, 1.0),
    ],
)
def test_bands_are_the_published_ones(name: str, low: float, high: float):
    chosen = steepest.linalg.COEFFICIENTS[name]
    found = polar_band(chosen.schedule(), chosen.margin)
    assert found == pytest.approx((low, high), abs=0.011)


@pytest.mark.parametrize("name", list(steepest.linalg.COEFFICIENTS))
def test_bands_are_those_that_the_sets_state(name: str):
    chosen = steepest.linalg.COEFFICIENTS[name]
    assert polar_band(chosen.schedule(), chosen.margin) == pytest.approx(chosen.band, abs=0.011)


def test_the_band_of_a_polynomial_by_hand():
    # σ(3 − σ²)/2 rises to 1 at σ = 1; its least on [0.001, 1] is at 0.001.
    assert polar_band(((1.5, -0.5),)) == pytest.approx((0.0015, 1.0), rel=1e-5)
    assert polar_band(((2.0, 0.0, 0.0), (1.0, -1.0))) == pytest.approx((-6.0, 6.0))
    assert math.isclose(polar_band(((1.0, 0.0),), 2.0)[1], 0.5)
