"""What an optimizer applies to each parameter, measured while it trains."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import LabError
from .trial import Observe, Series

# The entries under which optimizers keep an average of the gradients.
_MOMENTA = ("momentum_buffer", "exp_avg")


@dataclass(frozen=True)
class Update:
    """One parameter in one step, counted from 1."""

    step: int
    name: str
    direction: Tensor
    """The applied change without weight decay, over the learning rate: weights move by -lr · direction."""
    momentum: Tensor
    """The optimizer's average of the gradients after the step, bias-corrected where Adam's kin corrects the
    bias; the gradient itself if it has none."""


Measure = Callable[[Series, Update], None]
"""Adds to the series what it finds in an update."""


def observe_updates(measure: Measure, steps: int, points: int) -> Observe:
    """Return what measures the updates of about `points` of `steps` steps, evenly spaced, and the first.

    In such a step a copy of the optimizer steps zeros in place of the weights: its change is known to the
    last bit instead of being rounded to the weights' last, and contains no weight decay. Training goes on as
    if nobody looked. The trial should not decay the weights.

    Raises:
        LabError: during training, the copy's change is not that of the weights, as with optimizers whose
            steps depend on the weights.
    """
    every = max(1, math.ceil(steps / points))

    def observe(model: nn.Module, optimizer: Optimizer) -> Series:
        names = {parameter: name for name, parameter in model.named_parameters()}
        series: Series = {}

        def begin(step: int) -> Callable[[], None] | None:
            if step != 1 and step % every:
                return None
            kept = [p.detach().clone() for _, p in _params(optimizer)]
            return partial(finish, step, kept, _stepped_from_zero(optimizer))

        @torch.no_grad()
        def finish(step: int, kept: list[Tensor], copied: Optimizer) -> None:
            triples = zip(_params(optimizer), kept, _params(copied), strict=True)
            for (_, parameter), weights, (group, moved) in triples:
                if moved.grad is None:
                    continue
                change = -moved.double()
                rounding = 4 * torch.finfo(weights.dtype).eps * weights.double().norm()
                if (weights.double() - parameter - change).norm() > 0.01 * change.norm() + rounding:
                    raise LabError(_refusal(optimizer, names[parameter]))
                momentum = _momentum(copied, group, moved).double()
                direction = change / float(group["lr"])
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


def _stepped_from_zero(optimizer: Optimizer) -> Optimizer:
    """Return a copy of the optimizer that has stepped zeros, with the gradients of this step."""
    copied = copy.deepcopy(optimizer)
    copied._optimizer_step_pre_hooks.clear()
    copied._optimizer_step_post_hooks.clear()
    for (_, parameter), (_, moved) in zip(_params(optimizer), _params(copied), strict=True):
        moved.data.zero_()
        moved.grad = None if parameter.grad is None else parameter.grad.clone()
    try:
        # A scheduler may have replaced the method by one that steps the original.
        type(optimizer).step(copied)
    except ValueError as error:
        raise LabError(_refusal(optimizer, str(error))) from error
    return copied


def _refusal(optimizer: Optimizer, what: str) -> str:
    name = type(optimizer).__name__
    return f"the steps of {name} depend on the weights, so that its updates cannot be measured here: {what}"


def _momentum(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> Tensor:
    state = optimizer.state[parameter]
    for name in _MOMENTA:
        average = state.get(name)
        if isinstance(average, Tensor) and average.shape == parameter.shape:
            corrected = name == "exp_avg" and "step" in state and "betas" in group
            return average / (1 - group["betas"][0] ** float(state["step"])) if corrected else average
    assert parameter.grad is not None
    return parameter.grad
