"""Compare samplers for the lab's search of lr and weight decay, on lr curves that were measured.

The loss of a simulated trial is the measured curve of a rule on the text task (`learning_rates.jsonl`, linear
between its points), plus a made-up valley over the product of lr and weight decay, plus noise of 0.01. Each
line gives the mean excess over the best point, over all rules and seeds, after some numbers of trials:

  OMP_NUM_THREADS=1 python benchmarks/search_samplers.py

With ranges of four decades for lr and three for weight decay, in bits per byte:

| trials | 6 | 8 | 10 | 12 | 16 |
| --- | --- | --- | --- | --- | --- |
| Gaussian process | 0.10 | 0.034 | 0.019 | 0.018 | 0.014 |
| tree-structured Parzen estimator | 0.22 | 0.16 | 0.094 | 0.059 | 0.040 |
| steps of a factor of 4 from the default, then a Gaussian process | 0.048 | 0.034 | 0.023 | 0.016 | 0.011 |
| Gaussian process after the default alone | 0.12 | 0.050 | 0.035 | 0.023 | 0.009 |
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import numpy as np
import optuna
from optuna.samplers import BaseSampler, GPSampler, TPESampler

from steepest.lab.tasks import digits_task
from steepest.lab.training.optimizers import resolve_optimizers

FILE = Path(__file__).with_name("learning_rates.jsonl")
SHOWN = (6, 8, 10, 12, 16)
SPAN = 100.0
UNIFORM = 8.0
"""Bits per byte of a model that knows nothing; no trial is worse."""

Curve = tuple[np.ndarray, np.ndarray]


def read_curves() -> dict[str, Curve]:
    """Return log₁₀ lr and the mean metric of every rule on the text task."""
    points: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in FILE.read_text().splitlines():
        row = json.loads(line)
        if (row["task"], row["kind"]) == ("text", "together") and row["metric"] is not None:
            points[row["rule"]][row["lr"]].append(row["metric"])
    curves = {}
    for rule, found in points.items():
        values = np.array([fmean(found[lr]) for lr in sorted(found)])
        curves[rule] = np.log10(sorted(found)), np.where(np.isfinite(values), values, UNIFORM)
    return curves


def measured(curve: Curve, x: float) -> float:
    """Return the curve's value at log₁₀ lr = x; beyond its ends it rises."""
    xs, values = curve
    beyond = max(0.0, xs[0] - x) + 3 * max(0.0, x - xs[-1])
    return min(UNIFORM, float(np.interp(x, xs, values)) + beyond)


def make_sampler(kind: str, seed: int) -> BaseSampler:
    """Return the sampler for one trial, as the lab makes it."""
    if kind == "parzen":
        return TPESampler(seed=seed, n_startup_trials=4, multivariate=True)
    return GPSampler(seed=seed, n_startup_trials=4 if kind == "gaussian" else 1)


def next_step(study: optuna.Study, default: float) -> float | None:
    """Return the next lr of a walk by factors of 4 from the default until worse ones enclose the best."""
    tried = {trial.params["lr"]: trial.value for trial in study.trials}
    if not tried or len(tried) >= 6:
        return None
    lrs = sorted(tried)
    best = min(lrs, key=lambda lr: tried[lr])
    if best == lrs[-1] and 4 * best < SPAN * default:
        return 4 * best
    return best / 4 if best == lrs[0] and best / 4 > default / SPAN else None


def simulate(kind: str, curve: Curve, default: float, seed: int, trials: int) -> list[float]:
    """Return the excess of the best trial so far after each trial, without the search's noise."""
    draw = np.random.default_rng(seed)
    height, center = draw.uniform(0.02, 0.08), draw.uniform(-4.5, -3.5)

    def loss(lr: float, weight_decay: float) -> float:
        off = math.log10(lr * weight_decay) - center
        valley = min(1.0, off**2) if off < 0 else min(30.0, (off / 0.7) ** 2)
        return measured(curve, math.log10(lr)) + height * valley

    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", default / SPAN, default * SPAN, log=True)
        weight_decay = trial.suggest_float("weight_decay", 1e-3, 1.0, log=True)
        return min(UNIFORM, loss(lr, weight_decay) + 0.01 * draw.normal())

    study = optuna.create_study()
    excess = []
    for number in range(trials):
        study.sampler = make_sampler(kind, seed * 100_003 + number)
        lr = default if number == 0 else next_step(study, default) if kind == "walk" else None
        if lr is not None:
            study.enqueue_trial({"lr": lr, "weight_decay": 0.01})
        study.optimize(objective, n_trials=1)
        excess.append(loss(**study.best_params) - curve[1].min())
    return excess


def main() -> None:
    """Print a line per sampler."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--trials", type=int, default=max(SHOWN))
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    model = digits_task().make(0)
    curves = read_curves()
    defaults = {rule: resolve_optimizers(rule, model)[0].default_lr for rule in curves}
    for kind in ("gaussian", "parzen", "walk", "gaussian after the default alone"):
        found = np.mean(
            [
                simulate(kind, curve, defaults[rule], seed, arguments.trials)
                for rule, curve in curves.items()
                for seed in range(arguments.seeds)
            ],
            axis=0,
        )
        shown = (f"{n} trials {found[n - 1]:.3f}" for n in SHOWN if n <= arguments.trials)
        print(f"{kind}: {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
