"""Train the lab's text task by Muon with each coefficient set: same steps, learning rates, data and weights.

    python benchmarks/coefficient_race.py [--steps 300] [--seeds 4] [--lrs 0.01 0.02 0.04]

Newton-Schulz computes in bfloat16, as on GPUs. Everything but the hidden matrices is AdamW's, at one learning
rate. The metric is the mean over seeds of the final validation bits per byte, ± their standard deviation; "to
jordan" is the mean and the standard error of the difference with the same seed, which have the same data.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import steepest
from steepest.lab.tasks import text_task
from steepest.lab.training.optimizers import OptimizerSpec
from steepest.lab.training.trial import Trial, run_trial

SETS = ("jordan", "quintic", "polar_express", "minimax_9_17_3", "minimax_17_17_3", "minimax_17_17")


def muon(model: nn.Module, values: Mapping[str, Any], *, coefficients: str) -> Any:
    """Return Muon for the hidden matrices and AdamW for the rest."""
    options = {"coefficients": coefficients, "ns_dtype": torch.bfloat16}
    return steepest.build(model, "muon", lr=values["lr"], fallback_lr=3e-3, **options)


def main() -> None:
    """Run all trials, one learning rate after the other, and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.02, 0.01, 0.04])
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = replace(text_task(width=96), evaluations=1)
    for lr in options.lrs:
        finals: dict[str, list[float]] = {name: [] for name in SETS}
        for seed in range(options.seeds):
            for name in SETS:
                spec = OptimizerSpec(name, functools.partial(muon, coefficients=name), {"lr": lr})
                record = run_trial(task, spec, Trial(name, "search", seed, {"lr": lr}, options.steps))
                finals[name].append(record.validated(task.metric.name))
        print(f"lr {lr}, {options.steps} steps, {options.seeds} seeds", flush=True)
        for name, values in finals.items():
            gaps = [value - other for value, other in zip(values, finals["jordan"], strict=True)]
            spread, error = statistics.stdev(values), statistics.stdev(gaps) / len(gaps) ** 0.5
            print(
                f"  {name:16s} {statistics.mean(values):.4f} ± {spread:.4f}, "
                f"to jordan {statistics.mean(gaps):+.4f} ± {error:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
