"""The ways to train that are compared, each as a contestant of a race."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import steepest

from ..contestant import Contestant
from .bop import BopAdamW, BopLinear
from .latent import make_latent
from .watching import Watch, watch

DEFAULT_LR = 3e-3
"""Where the search of AdamW's learning rate starts; all methods train scales, norms and heads by AdamW."""

LABELS = {
    "adamw": "float32, AdamW",
    "ste": "latent float32 + STE, AdamW",
    "votes_sign": "votes by sign",
    "votes_magnitude": "votes by magnitude",
    "bop": "Bop",
    "frozen": "random ternary weights that stay",
}


@dataclass(frozen=True)
class Thresholds:
    """What is fixed beforehand: options of the votes by sign and by magnitude; Bop's γ, τ, annealing."""

    sign: dict[str, Any]
    magnitude: dict[str, Any]
    gamma: float = 0.01
    bop: float = 0.5
    power: float = 0.3


def contestants(thresholds: Thresholds, steps: int, file: Path) -> list[Contestant]:
    """Every method, for trials of so many steps; what is seen of their weights goes to ``file``."""

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
            chosen = {"votes": kind, "total_steps": steps, **options}
            return steepest.build(
                model, "adamw", lr=lr, weight_decay=0.0, seed=torch.initial_seed(), ternary=chosen
            )

        return make

    def bop(model: nn.Module, lr: float) -> Optimizer:
        layers = []
        for name in steepest.ternary.ternarize(model).replaced:
            layer = model.get_submodule(name)
            assert isinstance(layer, steepest.ternary.TernaryLinear)
            layers.append(BopLinear(layer))
            model.set_submodule(name, layers[-1])
        flipping = {id(layer.weight) for layer in layers}
        return BopAdamW(
            [p for p in model.parameters() if id(p) not in flipping],
            layers,
            lr=lr,
            gamma=thresholds.gamma,
            threshold=thresholds.bop,
            total_steps=steps,
            power=thresholds.power,
        )

    makers: dict[str, tuple[Callable[[nn.Module, float], Optimizer], dict[str, Any]]] = {
        "adamw": (adamw, {}),
        "ste": (ste, {}),
        "votes_sign": (votes("sign", thresholds.sign), thresholds.sign),
        "votes_magnitude": (votes("magnitude", thresholds.magnitude), thresholds.magnitude),
        "bop": (bop, {"gamma": thresholds.gamma, "threshold": thresholds.bop, "power": thresholds.power}),
        "frozen": (frozen, {}),
    }
    return [
        Contestant(label, _watched(label, make, steps, file), DEFAULT_LR, hyper, own_model=True)
        for label, (make, hyper) in makers.items()
    ]


def _watched(
    label: str, make: Callable[[nn.Module, float], Optimizer], steps: int, file: Path
) -> Callable[[nn.Module, float | None], Optimizer]:
    def made(model: nn.Module, lr: float | None) -> Optimizer:
        rate = DEFAULT_LR if lr is None else lr
        optimizer = make(model, rate)
        # A trial is begun under its seed.
        watch(optimizer, model, Watch(label, rate, torch.initial_seed()), steps, file)
        return optimizer

    return made
