"""The study: all methods with a perceptron and a convolutional net on digits, and with a GPT on text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import steepest

from ....defaults import TERNARY_TASKS
from ....errors import LabError
from ....files import parse_path
from ....models.digits import DigitConvNet, normed_mlp
from ....tasks import digits_task, text_task
from ....tasks.task import Task
from ....training.optimizers import OptimizerSpec, to_json_value
from ...sweep import Result, sweep
from .layers import BopAdamW, make_bop, make_latent
from .weights import observe_weights

LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""What each method tries; AdamW trains scales, norms and output layers with it in all of them."""

# All tasks share these, so that none is tuned to its own data.
_FLIPS = {"schedule": "annealed", "power": 0.3, "max_flip_fraction": 0.001}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "float32": {},
    "latent float32": {},
    "votes by sign": {"votes": "sign", "threshold": 24, **_FLIPS},
    "votes by magnitude": {"votes": "magnitude", "threshold": 32, **_FLIPS},
    "Bop": {"gamma": 0.01, "threshold": 0.5, "power": 0.3},
    "frozen random": {},
}
"""Ways to train the hidden weights, with their options: float32 by AdamW, latent floats by AdamW with a
straight-through gradient, votes, Bop, and random ternary weights that never change."""


def _digits(name: str, make: Callable[[], nn.Module]) -> Task[Any]:
    task = digits_task("mlp", batch=64)
    return replace(
        task, name=f"digits, {name}", make=lambda seed: make(), config={**task.config, "model": name}
    )


TASKS: Mapping[str, Callable[[], Task[Any]]] = {
    "mlp": lambda: _digits("mlp", normed_mlp),
    "convnet": lambda: _digits("convnet", lambda: DigitConvNet(32, patches=True)),
    "text": lambda: text_task(width=96),
}


def run(
    out: str | Path,
    tasks: Iterable[str] = TERNARY_TASKS,
    *,
    steps: int | None = None,
    seeds: int | None = None,
    lrs: Iterable[float] = LRS,
    **options: Any,
) -> list[Result]:
    """Run the study, or resume it.

    Args:
        out: The folder; each task has an experiment in a subfolder.
        tasks: Names from `TASKS`.
        seeds: The number of final seeds; by default 5, for text 3.
        lrs: The learning rates that each method tries.
        steps, options: See `steepest.lab.sweep`.

    Raises:
        LabError: a task is unknown, or a folder holds another experiment.
    """
    results = []
    for name in tasks:
        if name not in TASKS:
            raise LabError(f"unknown task {name!r} in --tasks: choose {', '.join(TASKS)}")
        task = TASKS[name]()
        number = task.steps if steps is None else steps
        results.append(
            sweep(
                task,
                [method(label, number) for label in METHODS],
                {"lr": list(lrs)},
                seeds=(3 if name == "text" else 5) if seeds is None else seeds,
                steps=number,
                out=parse_path(out) / name,
                kind="ternary",
                title=f"Ternary training: {task.name}",
                notes=("The thresholds of votes and Bop are not searched.",),
                observe=observe_weights(number),
                **options,
            )
        )
    return results


def method(label: str, steps: int, **changed: Any) -> OptimizerSpec:
    """Return a method of `METHODS`, with some options changed, for trials of `steps` steps."""
    options = {**METHODS[label], **changed}

    defaults = {"lr": 3e-3, "weight_decay": 0.0}

    def build(model: nn.Module, given: Mapping[str, Any]) -> Optimizer:
        values: dict[str, Any] = {**defaults, **given}
        if label == "Bop":
            layers = make_bop(model)
            ternary = {id(layer.weight) for layer in layers}
            floats = [p for p in model.parameters() if id(p) not in ternary]
            return BopAdamW(floats, layers, total_steps=steps, **options, **values)
        if label == "latent float32":
            make_latent(model)
        elif label == "frozen random":
            steepest.ternary.ternarize(model)
            values["ternary"] = False
        elif label != "float32":
            steepest.ternary.ternarize(model)
            # The trial has seeded torch's generator.
            values |= {"ternary": {"total_steps": steps, **options}, "seed": torch.initial_seed()}
        return steepest.build(model, "adamw", **values)

    return OptimizerSpec(label, build, to_json_value({**defaults, **options}), changes_model=True)
