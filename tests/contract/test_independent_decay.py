"""Independent decay is λ·(lr / η₀), with η₀ the rate that a schedule starts from, or OneCycleLR's peak."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler

import steepest

DECAY = 0.0625

# Schedules, and what they take for a whole.
SCHEDULES: dict[str, tuple[Callable[[Any], Any], float | None]] = {
    "warm-up": (lambda o: lr_scheduler.LambdaLR(o, lambda step: step / 4), None),
    "LinearLR": (lambda o: lr_scheduler.LinearLR(o, start_factor=0.25, total_iters=4), None),
    "OneCycleLR": (lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=6), 0.5),
    "CyclicLR": (lambda o: lr_scheduler.CyclicLR(o, base_lr=0.125, max_lr=0.5, step_size_up=2), 0.125),
}


def _shrunk(optimizer: Any, param: Parameter) -> float:
    """Take a step on a zero gradient, and return the part of the weight that it took away."""
    before = param.item()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    return 1 - param.item() / before


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("lr", [None, 0.1, 0.0])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.filterwarnings("ignore:.*divided by the group's first lr:UserWarning")
def test_it_follows_the_schedule(name: str, lr: float | None, tensor: bool):
    make, whole = SCHEDULES[name]
    if whole is None and lr == 0.0:
        return  # this schedule scales 0
    param = Parameter(torch.ones((), dtype=torch.float64))
    given: Any = {} if lr is None else {"lr": torch.tensor(lr, dtype=torch.float64) if tensor else lr}
    optimizer = steepest.Lion([param], weight_decay=DECAY, weight_decay_method="independent", **given)
    scheduler = make(optimizer)
    for _ in range(4):
        rate = float(optimizer.param_groups[0]["lr"])
        expected = DECAY * rate / (whole or (1e-4 if lr is None else lr))
        assert _shrunk(optimizer, param) == pytest.approx(expected, rel=1e-6, abs=1e-15)
        scheduler.step()


def test_made_at_a_rate_of_zero_it_says_what_it_does():
    param = Parameter(torch.ones(()))
    with pytest.warns(
        UserWarning, match="group 0: .*'independent' scales .* first lr, and that is 0.*initial_lr"
    ):
        optimizer = steepest.Lion([param], lr=0.0, weight_decay=DECAY, weight_decay_method="independent")
    assert _shrunk(optimizer, param) == 0
    optimizer.param_groups[0]["lr"] = 0.01
    assert _shrunk(optimizer, param) == pytest.approx(DECAY)
    optimizer.param_groups[0]["initial_lr"] = 0.04
    assert _shrunk(optimizer, param) == pytest.approx(DECAY / 4)


@pytest.mark.parametrize(
    "options", [{"weight_decay": 0.0}, {"weight_decay_method": "decoupled"}, {"lr": 0.1}, {"initial": 0.1}]
)
def test_it_says_nothing_where_there_is_nothing_to_say(options: dict[str, Any]):
    group: dict[str, Any] = {"params": [Parameter(torch.ones(()))]}
    if "initial" in options:
        group["initial_lr"] = options.pop("initial")
    made = {"lr": 0.0, "weight_decay": DECAY, "weight_decay_method": "independent", **options}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steepest.Lion([group], **made)


def test_a_checkpoint_goes_on_with_the_rate_it_began_with():
    def begun() -> tuple[Parameter, Any, Any]:
        param = Parameter(torch.ones((), dtype=torch.float64))
        optimizer = steepest.Lion([param], weight_decay=DECAY, weight_decay_method="independent")
        return param, optimizer, lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=8)

    param, optimizer, scheduler = begun()
    for _ in range(3):
        _shrunk(optimizer, param)
        scheduler.step()
    twin, again, scheduler_again = begun()
    again.load_state_dict(optimizer.state_dict())
    scheduler_again.load_state_dict(scheduler.state_dict())
    assert _shrunk(again, twin) == pytest.approx(_shrunk(optimizer, param), rel=1e-12)
