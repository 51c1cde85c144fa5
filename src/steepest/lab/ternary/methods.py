"""The training methods that the study compares, as optimizers of a race."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import steepest

from ..optimizer_spec import OptimizerSpec
from .bop import BopAdamW, BopLinear
from .latent import make_latent
from .weight_stats import WeightStats, record_weight_stats

DEFAULT_LR = 3e-3
"""The first lr of the search; in all methods AdamW trains scales, norms and output layers with it."""

LABELS = {
    "adamw": "float32, AdamW",
    "ste": "latent float32 + STE, AdamW",
    "votes_sign": "votes by sign",
    "votes_magnitude": "votes by magnitude",
    "bop": "Bop",
    "frozen": "frozen random ternary weights",
}


@dataclass(frozen=True)
class Thresholds:
    """Settings that are not tuned: options of votes by sign and by magnitude; Bop's γ, τ and power."""

    sign: dict[str, Any]
    magnitude: dict[str, Any]
    gamma: float = 0.01
    bop: float = 0.5
    power: float = 0.3


def method_specs(thresholds: Thresholds, steps: int, file: Path) -> list[OptimizerSpec]:
    """Return every method for trials of `steps` steps; statistics of the weights are appended to `file`."""

    def adamw(model: nn.Module, lr: float) -> Optimizer:
        return steepest.build(model, "adamw", lr=lr, weight_decay=0.0)

    def ste(model: nn.Module, lr: float) -> Optimizer:
        make_latent(model)
        return steepest.build(model, "adamw", lr=lr, weight_decay=0.0)

    def frozen(model: nn.Module, lr: float) -> Optimizer:
        steepest.ternary.ternarize(model)
        return steepest.build(model, "adamw", lr=lr, weight_decay=0.0, ternary=False)

    def votes(kind: str, options: dict[str, Any]) -> Callable[[nn.Module, float], Optimizer]:
        def make(model: nn.Module, lr: float) -> Optimizer:
            steepest.ternary.ternarize(model)
            ternary = {"votes": kind, "total_steps": steps, **options}
            return steepest.build(
                model, "adamw", lr=lr, weight_decay=0.0, seed=torch.initial_seed(), ternary=ternary
            )

        return make

    def bop(model: nn.Module, lr: float) -> Optimizer:
        layers = []
        for name in steepest.ternary.ternarize(model).replaced:
            layer = model.get_submodule(name)
            assert isinstance(layer, steepest.ternary.TernaryLinear)
            layers.append(BopLinear(layer))
            model.set_submodule(name, layers[-1])
        ternary = {id(layer.weight) for layer in layers}
        return BopAdamW(
            [p for p in model.parameters() if id(p) not in ternary],
            layers,
            lr=lr,
            gamma=thresholds.gamma,
            threshold=thresholds.bop,
            total_steps=steps,
            power=thresholds.power,
        )

    builders: dict[str, tuple[Callable[[nn.Module, float], Optimizer], dict[str, Any]]] = {
        "adamw": (adamw, {}),
        "ste": (ste, {}),
        "votes_sign": (votes("sign", thresholds.sign), thresholds.sign),
        "votes_magnitude": (votes("magnitude", thresholds.magnitude), thresholds.magnitude),
        "bop": (bop, {"gamma": thresholds.gamma, "threshold": thresholds.bop, "power": thresholds.power}),
        "frozen": (frozen, {}),
    }
    return [
        OptimizerSpec(label, _with_stats(label, build, steps, file), DEFAULT_LR, hyper, changes_model=True)
        for label, (build, hyper) in builders.items()
    ]


def _with_stats(
    label: str, build: Callable[[nn.Module, float], Optimizer], steps: int, file: Path
) -> Callable[[nn.Module, float | None], Optimizer]:
    def build_with_stats(model: nn.Module, lr: float | None) -> Optimizer:
        lr = DEFAULT_LR if lr is None else lr
        optimizer = build(model, lr)
        # `run_trial` has seeded torch's generator with the trial's seed.
        record_weight_stats(optimizer, model, WeightStats(label, lr, torch.initial_seed()), steps, file)
        return optimizer

    return build_with_stats
