"""SGD-SaI's grid: lr × weight decay → final metric, with ResNet-18 and ViT-S/16 (Xu et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...defaults import GRID_OPTIMIZERS
from ...errors import LabError
from ...files import parse_path
from ...tasks.images import images_task
from ...training.optimizers import OptimizerSpec
from ..sweep import Result, Space, sweep

SETTINGS = {"sgd": ("sgd.lr=0.1", "sgd.momentum=0.9", "sgd.weight_decay_method=decoupled")}
"""SGD as is customary for ResNets, but with the others' decoupled weight decay."""


def run(
    out: str | Path,
    data: Path | None = None,
    *,
    models: Sequence[str] = ("resnet18", "vit_s16"),
    optimizers: Sequence[str] = GRID_OPTIMIZERS,
    lrs: Sequence[float] | None = None,
    decays: Sequence[float] | None = None,
    steps: int | None = None,
    device: str | torch.device = "cpu",
    **options: Any,
) -> list[Result]:
    """Train a grid of learning rates and weight decays with each optimizer and model, or resume it.

    Both axes are relative to the optimizer's default lr η, so that the cells mean the same for each: a
    factor f of `lrs` stands for lr = f·η, and a value d of `decays` for weight_decay = d/η, which shrinks
    the weights by d per step at lr = η.

    Args:
        out: The folder; each model has an experiment in a subfolder.
        data, models: See `images_task`. By default digits, with small models, few cells and 500 steps.
        lrs: Factors of the default lr; by default a factor of 10 in both directions in steps of √10 with
            `data`, and from 1/√10 to √10 without.
        decays: By default 0, 1e-5, 1e-4 and 1e-3 with `data`, 0 and 1e-4 without.
        optimizers, steps, options: See `steepest.lab.sweep`.

    Raises:
        LabError: the data cannot be read, a model or optimizer is unknown, or a folder holds another
            experiment.
    """
    root = 10**0.5
    factors = lrs or ((1 / root, 1, root) if data is None else (0.1, 1 / root, 1, root, 10))
    shrinks = decays or ((0, 1e-4) if data is None else (0, 1e-5, 1e-4, 1e-3))
    if min(factors) <= 0 or min(shrinks) < 0:
        raise LabError(f"lrs must be positive and decays at least 0, got {factors} and {shrinks}")

    def space(spec: OptimizerSpec) -> Space:
        lr = spec.default_lr
        # Rounded, because a cell is found again by its values.
        return {
            "lr": [float(f"{factor * lr:.3g}") for factor in factors],
            "weight_decay": [float(f"{shrink / lr:.3g}") for shrink in shrinks],
        }

    results = []
    for model in models:
        # 500 steps do not teach so small a transformer digits at shifted places.
        small: dict[str, Any] = {"batch": 16, "augment": model == "resnet18"}
        task = images_task(data, model=model, device=device, **(small if data is None else {}))  # type: ignore[arg-type]
        results.append(
            sweep(
                task,
                optimizers,
                space,
                settings=[text for label in optimizers for text in SETTINGS.get(label, ())],
                steps=500 if steps is None and data is None else steps,
                out=parse_path(out) / model,
                kind="sgd-sai-grid",
                title=f"lr × weight decay: {model} on {task.config['data']}",
                notes=(
                    "All optimizers have the same cells, relative to their default lr η: "
                    f"lr = η times {_list(factors)}, weight decay = {_list(shrinks)} over η.",
                ),
                **options,
            )
        )
    return results


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
