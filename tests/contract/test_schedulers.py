"""Every learning-rate scheduler of torch drives every rule: as if its values were set by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from loops import for_each
from steepest.rule import find_rule

from .cases import CASES, LR, RULES, Case, spread
from .training import identical, make_params, set_gradients

STEPS = 8

Make = Callable[[torch.optim.Optimizer], Any]

SCHEDULERS: dict[str, Make] = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3), lr_scheduler.ExponentialLR(o, gamma=0.9)]
    ),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.7),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=4),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 5], gamma=0.1),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=STEPS, power=2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=3), lr_scheduler.ExponentialLR(o, gamma=0.9)],
        milestones=[3],
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
}

# What a rule calls its momentum, and what schedulers set.
MOMENTUM = ("momentum", "momentum_beta", "betas")
SCHEDULED = ("lr", *MOMENTUM)


def test_every_scheduler_of_torch_is_here():
    assert set(lr_scheduler.__all__) - {"LRScheduler"} == set(SCHEDULERS)


def _advance(scheduler: Any) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def _plan(make: Make, like: torch.optim.Optimizer, lr: float) -> list[list[dict[str, Any]]]:
    """What the scheduler does to an optimizer of torch with the same groups."""
    groups = [{"params": make_params(), "lr": group["lr"]} for group in like.param_groups]
    known = find_rule(like.param_groups[0]["rule"]).hyper
    own = next((name for name in MOMENTUM if name in known), None)
    betas = like.defaults["betas"] if own == "betas" else ()
    if betas:
        # Schedulers set the first and keep the others; AdamW takes two.
        torchs = torch.optim.AdamW(groups, lr=lr, betas=betas[:2])
    else:
        torchs = torch.optim.SGD(groups, lr=lr, momentum=0.0 if own is None else like.defaults[own])
    scheduler = make(torchs)
    plan = []
    for _ in range(STEPS):
        plan.append([{"lr": group["lr"]} for group in torchs.param_groups])
        for group, values in zip(torchs.param_groups, plan[-1], strict=True):
            if own is not None:
                values[own] = (*group["betas"], *betas[2:]) if betas else group["momentum"]
        torchs.step()
        _advance(scheduler)
    return plan


def _scheduled(case: Case) -> frozenset[str]:
    """What a scheduler may change, which is all that it sees of a rule."""
    return frozenset(SCHEDULED) & set(case.rule.hyper)


@for_each(("case", "name"), spread(CASES, SCHEDULERS, alike=_scheduled))
def test_a_scheduler_sets_what_could_be_set_by_hand(case: Case, name: str):
    def grouped(params: list[Any]) -> Any:
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.0625}]
        return case.make(groups, weight_decay=0.125)

    params, twins = case.params(), case.params()
    optimizer, twin = grouped(params), grouped(twins)
    plan = _plan(SCHEDULERS[name], twin, LR)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = SCHEDULERS[name](optimizer)
        for step in range(STEPS):
            for group, values in zip(twin.param_groups, plan[step], strict=True):
                group.update(values)
            set_gradients(params, step)
            set_gradients(twins, step)
            optimizer.step()
            twin.step()
            for ours, values in zip(optimizer.param_groups, plan[step], strict=True):
                assert {key: ours[key] for key in values} == values
            _advance(scheduler)
    assert len({str(values) for values in plan}) > 1
    assert identical(params, twins)


@for_each(("rule", "name"), spread(RULES, SCHEDULERS, alike=_scheduled))
def test_a_scheduler_drives_a_tensor_lr_in_place(rule: Case, name: str):
    params, twins = rule.params(), rule.params()
    lr = torch.tensor(0.03125, dtype=torch.float64)
    optimizer, twin = rule.make(params, lr=lr), rule.make(twins, lr=0.03125)
    scheduler, twin_scheduler = SCHEDULERS[name](optimizer), SCHEDULERS[name](twin)
    for step in range(STEPS):
        assert optimizer.param_groups[0]["lr"] is lr
        twin.param_groups[0]["lr"] = lr.item()
        assert lr.item() == pytest.approx(twin_scheduler.get_last_lr()[0], rel=1e-6)
        set_gradients(params, step)
        set_gradients(twins, step)
        optimizer.step()
        twin.step()
        twin.param_groups[0]["lr"] = twin_scheduler.get_last_lr()[0]
        _advance(scheduler)
        _advance(twin_scheduler)
    assert identical(params, twins)


@for_each("kind", [float, torch.tensor])
def test_cycled_momentum_is_the_momentum_used(case: Case, kind: Callable[[float], Any]):
    """Whatever the rule calls it; a step leaves no other key for it, nor a tensor."""
    params = case.params()
    optimizer = case.make(params)
    before = set(optimizer.param_groups[0])
    lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, base_momentum=kind(0.5), max_momentum=kind(0.75))
    set_gradients(params, 0)
    optimizer.step()
    group = optimizer.param_groups[0]
    cycled = [name for name in MOMENTUM if name in case.rule.hyper]
    assert bool(cycled) != ("cycled momentum" in case.cannot)
    for name in cycled[:1]:
        used = group[name][0] if name == "betas" else group[name]
        assert (used, type(used)) == (0.75, float)
    assert set(group) == before | {"initial_lr", "base_momentum", "max_momentum"}


@for_each("case", CASES)
def test_scheduler_and_optimizer_checkpoints_resume_together(case: Case):
    def build(params: list[Any]) -> tuple[Any, Any]:
        optimizer = case.make(params, weight_decay=0.125, weight_decay_method=case.rule.weight_decay_method)
        return optimizer, SCHEDULERS["OneCycleLR"](optimizer)

    def run(optimizer: Any, scheduler: Any, params: list[Any], which: range) -> None:
        for step in which:
            set_gradients(params, step)
            optimizer.step()
            scheduler.step()

    params, twins = case.params(), case.params()
    optimizer, scheduler = build(params)
    run(optimizer, scheduler, params, range(4))
    again, scheduler_again = build(params)
    again.load_state_dict(optimizer.state_dict())
    scheduler_again.load_state_dict(scheduler.state_dict())
    run(again, scheduler_again, params, range(4, 8))
    run(*build(twins), twins, range(8))
    assert identical(params, twins)
