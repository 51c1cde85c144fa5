"""Why an optimizer does what the race shows, by experiments on the text task.

Each experiment searches lr and weight decay for every variant, trains the best with three other seeds, and is
a folder that `steepest report` reads. Run it again to go on where it was interrupted:

  OMP_NUM_THREADS=1 python benchmarks/explanations.py [EXPERIMENT …]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import steepest
from steepest.lab import sweep
from steepest.lab.progress.plain import Plain
from steepest.lab.tasks import text_task
from steepest.lab.training.optimizers import OptimizerLike, OptimizerSpec
from steepest.lab.training.schedule import Schedule

TRIALS = 8
SEEDS = 3
# The input and output layers of the GPT, whose rows belong to bytes, some of them rare.
BYTES = {name: {"rule": "adamw", "lr": 2e-3} for name in ("embedding.*", "head.*")}


def variant(
    label: str, rule: str, model: nn.Module, overrides: Mapping[str, Any], **fixed: Any
) -> OptimizerSpec:
    """Return a spec that differs from `rule` in its options and in the rules of some parameters."""

    def build(model: nn.Module, values: Mapping[str, Any]) -> Optimizer:
        return steepest.build(model, rule, overrides=overrides, **values)

    defaults = build(model, fixed).defaults
    return OptimizerSpec(label, build, {**defaults, "lr": float(defaults["lr"])}, label, fixed)


def lion_and_momentum(model: nn.Module) -> list[OptimizerLike]:
    """How long may Lion's momentum remember, and which layers does it hurt?"""
    return [
        "adamw",
        "signum",
        "lion",
        variant("lion β 0.9, 0.9", "lion", model, {}, betas=(0.9, 0.9)),
        variant("lion β 0.95, 0.98", "lion", model, {}, betas=(0.95, 0.98)),
        variant("lion, bytes by adamw", "lion", model, BYTES),
        variant("signum, bytes by adamw", "signum", model, BYTES),
    ]


def sgd_and_layers(model: nn.Module) -> list[OptimizerLike]:
    """Is SGD-SaI's gap in the layers whose rows belong to bytes?"""
    return [
        "adamw",
        "sgd",
        "sgd_sai",
        variant("sgd, bytes by adamw", "sgd", model, BYTES),
        variant("sgd_sai, bytes by adamw", "sgd_sai", model, BYTES),
    ]


def sgd_sai_scales(model: nn.Module) -> list[OptimizerLike]:
    """Is SGD-SaI's gap in its scales, which the first gradient decides?"""
    return [
        "adamw",
        "sgd_sai",
        variant("sgd_sai, G = √d", "sgd_sai", model, {}, scale="sqrt_numel"),
        variant("sgd_sai, G = 1", "sgd_sai", model, {}, scale="none"),
        variant("sgd_sai, G of 10 batches", "sgd_sai", model, {}, warmup_batches=10),
    ]


def lion_and_signum(model: nn.Module) -> list[OptimizerLike]:
    """Lion and Signum beside AdamW."""
    return ["adamw", "signum", "lion"]


def sign_rules(model: nn.Module) -> list[OptimizerLike]:
    """The sign rules beside AdamW."""
    equal = variant("lion β 0.9, 0.9", "lion", model, {}, betas=(0.9, 0.9))
    return ["adamw", "signum", "signgsd", "lion", equal]


EXPERIMENTS: dict[
    str, tuple[str, Callable[[nn.Module], Sequence[OptimizerLike]], dict[str, Any], Schedule]
] = {
    "lion-momentum": ("Lion's momentum and its layers", lion_and_momentum, {}, Schedule()),
    "sgd-layers": ("SGD-SaI with AdamW in the byte layers", sgd_and_layers, {}, Schedule()),
    "sgd-sai-scales": ("SGD-SaI with other scales", sgd_sai_scales, {}, Schedule()),
    "batch-32": ("Sign rules with batches of 32", lion_and_signum, {"batch": 32}, Schedule()),
    "no-warmup": ("Sign rules without warm-up", sign_rules, {}, Schedule(warmup=0.0)),
    "constant-lr": ("Sign rules with a constant learning rate", sign_rules, {}, Schedule(decay="constant")),
}


def main() -> None:
    """Run the experiments that are named, by default all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("runs/explanations"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.experiments or EXPERIMENTS:
        title, choose, task_arguments, schedule = EXPERIMENTS[name]
        task = text_task(**task_arguments)
        sweep(
            task,
            choose(task.make(0)),
            trials=TRIALS,
            seeds=SEEDS,
            steps=arguments.steps,
            out=arguments.out / name,
            kind="explanation",
            title=title,
            schedule=schedule,
            callback=Plain(),
        )


if __name__ == "__main__":
    main()
