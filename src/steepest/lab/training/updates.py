"""What an optimizer applies to each parameter, measured while it trains."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .trial import Observe, Series

# The entries under which optimizers keep an average of the gradients.
_MOMENTA = ("momentum_buffer", "exp_avg")


@dataclass(frozen=True)
class Update:
    """One parameter in one step, counted from 1."""

    step: int
    name: str
    direction: Tensor
    """The change over the learning rate: weights move by -lr · direction."""
    momentum: Tensor
    """The optimizer's average of the gradients after the step, bias-corrected where Adam's kin corrects the
    bias; the gradient itself if it has none."""


Measure = Callable[[Series, Update], None]
"""Adds to the series what it finds in an update."""


def observe_updates(measure: Measure, steps: int, points: int) -> Observe:
    """Return what measures the updates of about `points` of `steps` steps, evenly spaced, and the first.

    The change is the difference of the weights, so it is rounded to their last bit, and contains weight
    decay, without which the trial should run.
    """
    every = math.ceil(steps / points)

    def observe(model: nn.Module, optimizer: Optimizer) -> Series:
        names = {parameter: name for name, parameter in model.named_parameters()}
        series: Series = {}

        def begin(step: int) -> Callable[[], None] | None:
            if step != 1 and step % every:
                return None
            return partial(finish, step, [p.detach().clone() for _, p in _params(optimizer)])

        @torch.no_grad()
        def finish(step: int, kept: list[Tensor]) -> None:
            for (group, parameter), before in zip(_params(optimizer), kept, strict=True):
                if parameter.grad is not None:
                    direction = (before.double() - parameter.double()) / float(group["lr"])
                    momentum = _momentum(optimizer, group, parameter).double()
                    measure(series, Update(step, names[parameter], direction, momentum))

        around_steps(optimizer, begin)
        return series

    return observe


def around_steps(optimizer: Optimizer, begin: Callable[[int], Callable[[], None] | None]) -> None:
    """Call `begin(step)` before each step, counted from 1, and what it returns, if anything, after it."""
    steps = itertools.count(1)
    finish: Callable[[], None] | None = None

    def on_start(*_: Any) -> None:
        nonlocal finish
        finish = begin(next(steps))

    def on_end(*_: Any) -> None:
        if finish is not None:
            finish()

    optimizer.register_step_pre_hook(on_start)
    optimizer.register_step_post_hook(on_end)


def _params(optimizer: Optimizer) -> list[tuple[dict[str, Any], nn.Parameter]]:
    return [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]


def _momentum(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> Tensor:
    state = optimizer.state[parameter]
    for name in _MOMENTA:
        average = state.get(name)
        if isinstance(average, Tensor) and average.shape == parameter.shape:
            corrected = name == "exp_avg" and "step" in state and "betas" in group
            return average / (1 - group["betas"][0] ** float(state["step"])) if corrected else average
    assert parameter.grad is not None
    return parameter.grad
