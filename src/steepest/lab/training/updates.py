"""What an optimizer applies to each parameter, measured while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
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
    """One parameter in one step.

    Attributes:
        step: The step, from 1.
        name: The parameter's name.
        direction: The applied change without weight decay, over the learning rate: the weights move by
            -lr · direction.
        momentum: The optimizer's average of the gradients after the step, with Adam's bias correction where
            it corrects the bias; the gradient itself if it has none.
    """

    step: int
    name: str
    direction: Tensor
    momentum: Tensor


Measure = Callable[[Series, Update], None]
"""Adds to the series what it finds in an update."""


def observe_updates(measure: Measure, steps: int, points: int) -> Observe:
    """Return what measures the updates of about `points` of `steps` steps, evenly spaced, and the first.

    In such a step the optimizer finds zeros in place of the weights, so that its change is known to the last
    bit instead of being rounded to that of the weights, and then contains no weight decay. The weights move
    by it afterwards. Updates must not depend on the weights otherwise, and the trial should not decay them.

    Raises:
        LabError: during training, an optimizer does not move from zero, as those that hold the weights'
            norm.
    """
    every = max(1, math.ceil(steps / points))

    def observe(model: nn.Module, optimizer: Optimizer) -> Series:
        names = {parameter: name for name, parameter in model.named_parameters()}
        series: Series = {}
        kept: dict[nn.Parameter, Tensor] = {}
        step = 0

        @torch.no_grad()
        def before(*_: Any) -> None:
            nonlocal step
            step += 1
            if step == 1 or step % every == 0:
                for parameter in names:
                    if parameter.grad is not None:
                        kept[parameter] = parameter.clone()
                        parameter.zero_()

        @torch.no_grad()
        def after(*_: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    weights = kept.pop(parameter, None)
                    if weights is None:
                        continue
                    momentum = _momentum(optimizer, group, parameter).double()
                    direction = -parameter.double() / float(group["lr"])
                    parameter.add_(weights)
                    if momentum.any() and not direction.any():
                        raise LabError(
                            f"{names[parameter]} does not move from zero: {type(optimizer).__name__} needs "
                            "the weights for its step, which cannot be measured here"
                        )
                    measure(series, Update(step, names[parameter], direction, momentum))

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        return series

    return observe


def _momentum(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> Tensor:
    state = optimizer.state[parameter]
    for name in _MOMENTA:
        average = state.get(name)
        if isinstance(average, Tensor) and average.shape == parameter.shape:
            corrected = name == "exp_avg" and "step" in state and "betas" in group
            return average / (1 - group["betas"][0] ** float(state["step"])) if corrected else average
    assert parameter.grad is not None
    return parameter.grad
