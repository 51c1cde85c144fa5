"""Flips per step, the fraction of zeros and bytes per weight, observed from outside the optimizer."""

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
class Watch:
    """What was seen of one trial: at some steps, which part of the weights moved then, and which is 0."""

    method: str
    lr: float
    seed: int
    bytes_per_weight: float = 0.0
    steps: list[int] = field(default_factory=list)
    flips: list[float] = field(default_factory=list)
    zeros: list[float] = field(default_factory=list)


def watch(optimizer: Optimizer, model: nn.Module, seen: Watch, steps: int, file: Path) -> None:
    """Observe an optimizer's steps, and write what was seen to ``file`` after the last one.

    Ternary weights are compared before and after a step, whatever moves them: of all methods alike.
    """
    sampled = {max(1, round(steps * mark / _SAMPLES)) for mark in range(1, _SAMPLES + 1)}
    taken = 0
    before: Tensor | None = None

    def look(*_: Any) -> None:
        nonlocal before
        before = _values(model) if taken + 1 in sampled else None

    def compare(*_: Any) -> None:
        nonlocal taken
        taken += 1
        if before is not None:
            after = _values(model)
            seen.steps.append(taken)
            seen.flips.append((before != after).double().mean().item())
            seen.zeros.append((after == 0).double().mean().item())
        if taken == steps:
            seen.bytes_per_weight = bytes_per_weight(model, optimizer)
            with file.open("a") as out:
                out.write(json.dumps(asdict(seen)) + "\n")

    optimizer.register_step_pre_hook(look)
    optimizer.register_step_post_hook(compare)


def read_watches(file: Path) -> list[Watch]:
    """What was seen of all trials, of each once."""
    lines = file.read_text().splitlines() if file.exists() else []
    watches = [Watch(**json.loads(line)) for line in lines]
    return list({(w.method, w.lr, w.seed): w for w in watches}.values())


def bytes_per_weight(model: nn.Module, optimizer: Optimizer) -> float:
    """Persistent bytes of the hidden weights and of what trains them, per weight, without gradients.

    Counted on the tensors that exist; Bop's weights, which are floats here, as 2 bits.
    """
    held, weights = 0.0, 0
    averages = {id(w): m for w, m in optimizer.averages} if isinstance(optimizer, BopAdamW) else {}
    votes = isinstance(optimizer, steepest.ternary.TernaryOptimizer)
    for name in _layers(model):
        layer = model.get_submodule(name)
        if isinstance(layer, steepest.ternary.TernaryLinear):
            weights += layer.in_features * layer.out_features
            held += layer.packed.nbytes
            held += optimizer.state[layer.scale]["votes"].nbytes if votes else 0
        elif isinstance(layer, BopLinear):
            weights += layer.weight.numel()
            held += layer.weight.numel() / 4 + averages[id(layer.weight)].nbytes
        else:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            weights += weight.numel()
            held += weight.nbytes + sum(v.nbytes for v in optimizer.state[weight].values() if v.dim())
    return held / weights


def _layers(model: nn.Module) -> list[str]:
    """Names of the ternary layers; where there are none, of the linear ones but the head."""
    kinds = (steepest.ternary.TernaryLinear, BopLinear, LatentTernaryLinear)
    found = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return found or [name for name in linears if not name.endswith("head")][: len(linears) - 1]


def _values(model: nn.Module) -> Tensor:
    parts = []
    for module in model.modules():
        if isinstance(module, steepest.ternary.TernaryLinear):
            parts.append(module.unpack().flatten())
        elif isinstance(module, (BopLinear, LatentTernaryLinear)):
            parts.append(module.ternary().detach().flatten().to(torch.int8))
    # A float model has none: nothing flips, and nothing is said of zeros.
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int8)
