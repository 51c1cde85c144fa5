"""What happens to the ternary weights: flips per step, fraction of zeros, and bytes per weight.

They are measured in step hooks, in the same way for every method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import steepest

from ....training.trial import Observe, Series
from ....training.updates import around_steps
from .layers import BopAdamW, BopLinear, LatentTernaryLinear

FLIPS = "fraction of the weights flipped in a step"
ZEROS = "fraction of the weights that are 0"
BYTES = "bytes per hidden weight"

_SAMPLES = 40


def observe_weights(steps: int) -> Observe:
    """Return an observer for trials of `steps` steps, which samples about 40 of them.

    Models without ternary layers have the bytes alone.
    """
    every = math.ceil(steps / _SAMPLES)

    def observe(model: nn.Module, optimizer: Optimizer) -> Series:
        series: Series = {}

        def begin(step: int) -> Callable[[], None] | None:
            return None if step % every else partial(finish, step, _ternary_values(model))

        def finish(step: int, before: Tensor) -> None:
            series.setdefault(BYTES, []).append((step, bytes_per_weight(model, optimizer)))
            if len(before):
                after = _ternary_values(model)
                series.setdefault(FLIPS, []).append((step, (before != after).double().mean().item()))
                series.setdefault(ZEROS, []).append((step, (after == 0).double().mean().item()))

        around_steps(optimizer, begin)
        return series

    return observe


def bytes_per_weight(model: nn.Module, optimizer: Optimizer) -> float:
    """Measure the persistent bytes of the hidden weights and their optimizer state per weight.

    Gradients do not count. Bop's weights, which are floats here, count as 2 bits.
    """
    nbytes, weights = 0.0, 0
    averages = {id(w): m for w, m in optimizer.averages} if isinstance(optimizer, BopAdamW) else {}
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in _ternary_layers(model) or linears[:-1]:
        weight = layer.unpack() if isinstance(layer, steepest.ternary.TernaryLinear) else layer.weight
        weights += weight.numel()
        if isinstance(layer, steepest.ternary.TernaryLinear):
            # Frozen layers have no accumulator.
            accumulator = optimizer.state.get(layer.votes, {}).get("accumulator")
            nbytes += layer.packed.nbytes + (0 if accumulator is None else accumulator.nbytes)
        elif isinstance(layer, BopLinear):
            nbytes += weight.numel() / 4 + averages[id(weight)].nbytes
        else:
            nbytes += weight.nbytes + sum(v.nbytes for v in optimizer.state[weight].values() if v.dim())
    return nbytes / weights


def _ternary_layers(model: nn.Module) -> list[Any]:
    kinds = (steepest.ternary.TernaryLinear, BopLinear, LatentTernaryLinear)
    return [module for module in model.modules() if isinstance(module, kinds)]


def _ternary_values(model: nn.Module) -> Tensor:
    parts = [
        (layer.unpack() if isinstance(layer, steepest.ternary.TernaryLinear) else layer.ternary().detach())
        for layer in _ternary_layers(model)
    ]
    return torch.cat([part.flatten().to(torch.int8) for part in parts]) if parts else torch.zeros(0)
