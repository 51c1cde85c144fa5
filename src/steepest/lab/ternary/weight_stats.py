"""Statistics of ternary weights: flips per step, fraction of zeros, and bytes per weight.

They are measured in step hooks, in the same way for every method.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import steepest

from .bop import BopAdamW, BopLinear
from .latent import LatentTernaryLinear

_SAMPLES = 40


@dataclass
class WeightStats:
    """One trial's statistics: at the sampled steps, the fractions of weights that flipped and that are 0."""

    method: str
    lr: float
    seed: int
    bytes_per_weight: float = 0.0
    steps: list[int] = field(default_factory=list)
    flips: list[float] = field(default_factory=list)
    zeros: list[float] = field(default_factory=list)


def record_weight_stats(
    optimizer: Optimizer, model: nn.Module, stats: WeightStats, steps: int, file: Path
) -> None:
    """Register hooks that fill in ``stats`` and append it to ``file`` after the last step.

    The hooks compare the ternary weights before and after a step.
    """
    sampled = {max(1, round(steps * number / _SAMPLES)) for number in range(1, _SAMPLES + 1)}
    step = 0
    before: Tensor | None = None

    def before_step(*_: Any) -> None:
        nonlocal before
        before = _ternary_values(model) if step + 1 in sampled else None

    def after_step(*_: Any) -> None:
        nonlocal step
        step += 1
        if before is not None:
            after = _ternary_values(model)
            stats.steps.append(step)
            stats.flips.append((before != after).double().mean().item())
            stats.zeros.append((after == 0).double().mean().item())
        if step == steps:
            stats.bytes_per_weight = bytes_per_weight(model, optimizer)
            with file.open("a") as out:
                out.write(json.dumps(asdict(stats)) + "\n")

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)


def read_weight_stats(file: Path) -> list[WeightStats]:
    """Read the statistics of all trials; if a trial was repeated, only its last ones."""
    lines = file.read_text().splitlines() if file.exists() else []
    weight_stats = [WeightStats(**json.loads(line)) for line in lines]
    return list({(w.method, w.lr, w.seed): w for w in weight_stats}.values())


def bytes_per_weight(model: nn.Module, optimizer: Optimizer) -> float:
    """Measure the persistent bytes of the hidden weights and their optimizer state per weight.

    Gradients do not count. Bop's weights, which are floats here, count as 2 bits.
    """
    nbytes, weights = 0.0, 0
    averages = {id(w): m for w, m in optimizer.averages} if isinstance(optimizer, BopAdamW) else {}
    for name in _layers(model):
        layer = model.get_submodule(name)
        if isinstance(layer, steepest.ternary.TernaryLinear):
            weights += layer.in_features * layer.out_features
            nbytes += layer.packed.nbytes
            nbytes += _accumulator_bytes(optimizer, layer.votes)
        elif isinstance(layer, BopLinear):
            weights += layer.weight.numel()
            nbytes += layer.weight.numel() / 4 + averages[id(layer.weight)].nbytes
        else:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            weights += weight.numel()
            nbytes += weight.nbytes + sum(v.nbytes for v in optimizer.state[weight].values() if v.dim())
    return nbytes / weights


def _accumulator_bytes(optimizer: Optimizer, votes: Tensor) -> int:
    """Return the bytes of a layer's accumulator; 0 where another optimizer steps what stands for T."""
    accumulator = optimizer.state.get(votes, {}).get("accumulator")
    return 0 if accumulator is None else accumulator.nbytes


def _layers(model: nn.Module) -> list[str]:
    """Return the names of the ternary layers or, if there are none, of all linear layers but the last."""
    ternary = (steepest.ternary.TernaryLinear, BopLinear, LatentTernaryLinear)
    names = [name for name, module in model.named_modules() if isinstance(module, ternary)]
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return names or [name for name in linears if not name.endswith("head")][: len(linears) - 1]


def _ternary_values(model: nn.Module) -> Tensor:
    parts = []
    for module in model.modules():
        if isinstance(module, steepest.ternary.TernaryLinear):
            parts.append(module.unpack().flatten())
        elif isinstance(module, (BopLinear, LatentTernaryLinear)):
            parts.append(module.ternary().detach().flatten().to(torch.int8))
    # A float model has no ternary values; the means over an empty tensor are NaN.
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int8)
