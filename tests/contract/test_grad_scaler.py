"""GradScaler: unscale, clip, step, update, and a step skipped for an infinite gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

from loops import for_each

from .cases import CASES, RULES, Case, reach, spread
from .training import gradient, identical, snapshot

SCALE = 1024.0


def _scaler(device: torch.device, scale: float = SCALE) -> GradScaler:
    scaler = GradScaler(device.type, init_scale=scale, growth_interval=2)
    scaler.scale(torch.zeros((), device=device))  # the scale's tensor is made on first use
    return scaler


@pytest.mark.parametrize(
    ("case", "options"),
    spread(CASES, [{}, {"nonfinite": "skip"}, {"nonfinite": "raise"}], alike=reach),
    ids=str,
)
def test_scaled_unscaled_clipped_training_is_training(
    case: Case, options: dict[str, Any], device: torch.device
):
    """The scale is a power of two, so that scaling is exact."""
    params, twins = case.params(device=device), case.params(device=device)
    optimizer, twin = case.make(params, **options), case.make(twins, **options)
    scaler = _scaler(device)
    for step in range(5):
        for index, (param, other) in enumerate(zip(params, twins, strict=True)):
            other.grad = gradient(other, index, step)
            param.grad = other.grad * scaler.get_scale()
        scaler.unscale_(optimizer)
        for some in (params, twins):
            clip_grad_norm_(some, 1.0)
        scaler.step(optimizer)
        scaler.update()
        twin.step()
    assert scaler.get_scale() == 4 * SCALE
    assert identical(params, twins)
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])


def test_without_unscale_the_scaler_unscales_once(case: Case, device: torch.device):
    params, twins = case.params(device=device), case.params(device=device)
    optimizer, twin = case.make(params), case.make(twins)
    scaler = _scaler(device)
    for step in range(3):
        for index, (param, other) in enumerate(zip(params, twins, strict=True)):
            other.grad = gradient(other, index, step)
            param.grad = other.grad * scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        twin.step()
    assert identical(params, twins)


@pytest.mark.parametrize(("case", "bad"), spread(CASES, [torch.inf, torch.nan], alike=reach), ids=str)
def test_an_overflow_skips_the_step_and_halves_the_scale(case: Case, bad: float, device: torch.device):
    params = case.params(device=device)
    optimizer, scaler = case.make(params), _scaler(device)

    def scaled_step(step: int, spoil: bool) -> None:
        for index, param in enumerate(params):
            param.grad = gradient(param, index, step) * scaler.get_scale()
        if spoil:
            params[1].grad[3] = bad
        scaler.step(optimizer)
        scaler.update()

    scaled_step(0, spoil=False)
    before = snapshot(optimizer, params)
    scaled_step(1, spoil=True)
    assert identical(snapshot(optimizer, params), before)
    assert scaler.get_scale() == SCALE / 2
    scaled_step(1, spoil=False)
    assert not identical(snapshot(optimizer, params), before)
    assert optimizer.skipped_steps == 0, "the scaler skipped, not the optimizer"


@pytest.mark.parametrize(("case", "bad"), spread(CASES, [torch.inf, torch.nan], alike=reach), ids=str)
def test_clipping_by_a_norm_that_is_not_finite_is_skipped(case: Case, bad: float, device: torch.device):
    """One bad element makes the norm infinite or NaN, and clipping then spoils every gradient."""
    params, twins = case.params(device=device), case.params(device=device)
    optimizer, twin = case.make(params, nonfinite="skip"), case.make(twins)
    for step in range(4):
        for some in (params, twins):
            for index, param in enumerate(some):
                param.grad = gradient(param, index, step)
        clip_grad_norm_(twins, 1.0)
        twin.step()
        params[1].grad.view(-1)[0] = bad
        assert not clip_grad_norm_(params, 1.0).isfinite()
        assert sum(bool(param.grad.isnan().any()) for param in params) == (3 if bad != bad else 1)
        optimizer.step()
        for index, param in enumerate(params):
            param.grad = gradient(param, index, step)
        clip_grad_norm_(params, 1.0)
        optimizer.step()
    assert identical(params, twins)
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])
    assert optimizer.skipped_steps == 4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_optimizer_skips_what_the_scaler_does_not_see(case: Case, device: torch.device):
    """The scaler looks at gradients when it unscales them; the optimizer skips what spoils them later."""
    params, twins = case.params(device=device), case.params(device=device)
    optimizer, twin = case.make(params, nonfinite="skip"), case.make(twins)
    scaler = _scaler(device)
    for step in range(3):
        for spoil in (True, False):
            for index, param in enumerate(params):
                param.grad = gradient(param, index, step) * scaler.get_scale()
            scaler.unscale_(optimizer)
            if spoil:
                params[0].grad.view(-1)[0] = torch.nan
            scaler.step(optimizer)
            scaler.update()
        for index, other in enumerate(twins):
            other.grad = gradient(other, index, step)
        twin.step()
    assert identical(params, twins)
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])
    assert optimizer.skipped_steps == 3
    assert scaler.get_scale() > SCALE, "the scaler saw no overflow"


def test_with_autocast_and_a_real_backward(case: Case, device: torch.device):
    def run(scaled: bool) -> list[Tensor]:
        params = case.params(device=device, shapes=[(3, 3)])
        optimizer, scaler = case.make(params), GradScaler(device.type, init_scale=SCALE, enabled=scaled)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                loss = (params[0] @ params[0]).float().pow(2).sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return params

    assert identical(run(scaled=True), run(scaled=False))


@for_each("rule", RULES)
def test_the_scaler_returns_the_step_s_result(rule: Case):
    params = rule.params()
    optimizer, scaler = rule.make(params), GradScaler("cpu", enabled=False)
    for index, param in enumerate(params):
        param.grad = gradient(param, index, 0)
    assert scaler.step(optimizer) is None
