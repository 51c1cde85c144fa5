"""What happens to the ternary weights: flips per step, fraction of zeros, and bytes per weight.

They are measured in step hooks, in the same way for every method.
"""

from __future__ import annotations

import math

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

    Models without ternary layers have the bytes alone, which are measured once.
    """
    every = math.ceil(steps / _SAMPLES)

    def observe(model: nn.Module, optimizer: Optimizer) -> Series:
        series: Series = {}

        def after_step(step: int, before: Tensor) -> None:
            if BYTES not in series:
                series[BYTES] = [(step, bytes_per_weight(model, optimizer))]
            if len(before):
                after = _ternary_values(model)
                series.setdefault(FLIPS, []).append((step, (before != after).double().mean().item()))
                series.setdefault(ZEROS, []).append((step, (after == 0).double().mean().item()))

        around_steps(optimizer, lambda step: step % every == 0, lambda: _ternary_values(model), after_step)
        return series

    return observe


def bytes_per_weight(model: nn.Module, optimizer: Optimizer) -> float:
    """Measure the persistent bytes of the hidden weights and their optimizer state per weight.

    Gradients do not count. Bop's weights, which are floats here, count as 2 bits.
    """
    nbytes, weights = 0.0, 0
    averages = {id(w): m for w, m in optimizer.averages} if isinstance(optimizer, BopAdamW) else {}
    for layer in _layers(model):
        if isinstance(layer, steepest.ternary.TernaryLinear):
            weights += layer.in_features * layer.out_features
            # Frozen layers have no accumulator.
            accumulator = optimizer.state.get(layer.votes, {}).get("accumulator")
            nbytes += layer.packed.nbytes + (0 if accumulator is None else accumulator.nbytes)
        elif isinstance(layer, BopLinear):
            weights += layer.weight.numel()
            nbytes += layer.weight.numel() / 4 + averages[id(layer.weight)].nbytes
        else:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            weights += weight.numel()
            nbytes += weight.nbytes + sum(v.nbytes for v in optimizer.state[weight].values() if v.dim())
    return nbytes / weights


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the ternary layers or, if there are none, all linear layers but the last."""
    ternary = (steepest.ternary.TernaryLinear, BopLinear, LatentTernaryLinear)
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, ternary)]
    linears: list[nn.Module] = [module for module in model.modules() if type(module) is nn.Linear]
    return layers or linears[:-1]


def _ternary_values(model: nn.Module) -> Tensor:
    parts = []
    for module in model.modules():
        if isinstance(module, steepest.ternary.TernaryLinear):
            parts.append(module.unpack().flatten())
        elif isinstance(module, BopLinear | LatentTernaryLinear):
            parts.append(module.ternary().detach().flatten().to(torch.int8))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int8)
