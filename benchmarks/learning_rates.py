"""Sweep the learning rate of every rule on the lab's two tasks; a finished trial is a line of a file.

The learning rates lie on the grid 10^(k/4). A sweep walks in steps of √10 until the best one has a worse one on
either side, tries those between, and repeats the three best with two more seeds, and their neighbours until the
best mean lies between worse ones. Three kinds of sweeps:

  together  all groups of ``steepest.build(model, rule)``, in the ratio of their defaults
  alone     the learning rate of a rule for hidden matrices; the rest stays with AdamW at AdamW's best
  decay     weight decay at the best learning rate of the same sweep

Run it again to go on where it was interrupted:

  OMP_NUM_THREADS=1 python benchmarks/learning_rates.py
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import steepest
from steepest.lab.machine import describe
from steepest.lab.optimizer_spec import OptimizerSpec
from steepest.lab.records import TrialSpec
from steepest.lab.task import Task
from steepest.lab.tasks import digits_task, text_task
from steepest.lab.tasks.digits import load
from steepest.lab.trial import run_trial

FILE = Path(__file__).with_suffix(".jsonl")
STEPS = {"text": 400, "digits": 300}
SEEDS = (0, 1, 2)
# Without the rule for ternary weights, and the base class, which has no matrix function of its own.
RULES = [name for name in steepest.list_optimizers() if name not in ("orthogonalized", "ternary_flip")]
HIDDEN_ONLY = ["hyperball", "muon", "normuon", "polargrad", "scion"]
# Where the search begins: near the best of earlier races, which saves trials and changes no result.
START = {
    "adamw": 2e-3, "ademamix": 2e-3, "lion": 5e-4, "muon": 3e-2, "normuon": 3e-2,
    "polargrad": 3e-2, "procrustes": 2e-2, "quad": 2e-2, "scion": 3e-2, "sgd": 3e-1, "sgd_sai": 3e-3,
    "signgsd": 1e-3, "simba": 1e-3, "simba_leaky": 1e-3, "soap": 1e-2,
}  # fmt: skip
DECAYS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DECAYED = ("adamw", "lion", "muon")

Scores = dict[int, dict[int, float]]
"""The score by the learning rate's place k in the grid, and by the seed; lower is better."""


def task_of(name: str) -> Task[Any]:
    """Return the task; that of digits is judged by the cross-entropy of the test digits, which is smooth."""
    if name == "text":
        return text_task()
    images, labels = load()[1]

    def evaluate(model: nn.Module) -> float:
        return F.cross_entropy(model(images), labels).item()

    return replace(digits_task(), evaluate=evaluate, lower_is_better=True)


def grid(k: int) -> float:
    """Return the learning rate at place k of the grid, in two digits."""
    return float(f"{10 ** (k / 4):.1e}")


def place(lr: float) -> int:
    """Return the place of the nearest learning rate, an even one: the grid in steps of √10."""
    return 2 * round(2 * math.log10(lr))


@dataclass
class Sweeps:
    """The file's trials, and the means to run more."""

    path: Path
    tasks: dict[str, Task[Any]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.rows = [json.loads(line) for line in self.path.read_text().splitlines()]

    def scores(self, task: str, rule: str, kind: str, decay: float = 0.0) -> Scores:
        """Return the scores of a sweep; infinite where training diverged."""
        found: Scores = {}
        for row in self.rows:
            if (row["task"], row["rule"], row["kind"], row["weight_decay"]) == (task, rule, kind, decay):
                score = math.inf if row["metric"] is None else row["metric"]
                found.setdefault(round(4 * math.log10(row["lr"])), {})[row["seed"]] = score
        return found

    def run(self, task: str, rule: str, kind: str, k: int, seed: int, decay: float = 0.0) -> None:
        """Run one trial and append it to the file, unless it is there."""
        if seed in self.scores(task, rule, kind, decay).get(k, {}):
            return
        if task not in self.tasks:
            self.tasks[task] = task_of(task)
        alone = grid(best(self.scores(task, "adamw", "together"))) if kind == "alone" else None

        def builder(model: nn.Module, lr: float | None) -> torch.optim.Optimizer:
            if alone is None:
                optimizer = steepest.build(model, rule, weight_decay=decay)
                ratio = grid(k) / optimizer.param_groups[0]["lr"]
                for group in optimizer.param_groups:
                    group["lr"] *= ratio
                return optimizer
            return steepest.build(model, rule, lr=grid(k), fallback_lr=alone, weight_decay=decay)

        spec = OptimizerSpec(rule, builder, grid(k), {})
        trial = TrialSpec("search", 0, rule, grid(k), seed)
        steps = STEPS[task]
        record = run_trial(self.tasks[task], spec, trial, steps=steps, evaluations=1, machine={})
        row = {
            "task": task, "rule": rule, "kind": kind, "lr": grid(k), "fallback_lr": alone, "weight_decay": decay,
            "seed": seed, "steps": steps, "metric": None if math.isnan(record.metric) else record.metric,
            "step_ms": round(record.step_ms, 2), "torch": torch.__version__,
        }  # fmt: skip
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(task, rule, kind, grid(k), f"decay {decay:g}", f"seed {seed}", row["metric"], flush=True)

    def search(self, task: str, rule: str, kind: str) -> None:
        """Search with the first seed until the best learning rate lies between two worse neighbours."""
        start = START.get(rule, 1e-2 if rule != "signum" else 1e-3)
        k = place(start)
        for step in (2, 1):
            while True:
                for each in (k, k + step, k - step):
                    self.run(task, rule, kind, each, SEEDS[0])
                best_k = best({each: seeds for each, seeds in self.scores(task, rule, kind).items()}, 1)
                if best_k == k:
                    break
                k = best_k

    def repeat(self, task: str, rule: str, kind: str) -> None:
        """Repeat the best learning rate and its neighbours with all seeds until the best mean is interior."""
        k = best(self.scores(task, rule, kind), 1)
        while True:
            for each in (k, k + 1, k - 1):
                for seed in SEEDS:
                    self.run(task, rule, kind, each, seed)
            best_k = best(self.scores(task, rule, kind))
            if best_k == k:
                return
            k = best_k


def best(scores: Scores, seeds: int = len(SEEDS)) -> int:
    """Return the place of the lowest mean over the first seeds; those with fewer count if there are no others."""
    full = {k: each for k, each in scores.items() if set(SEEDS[:seeds]) <= each.keys()} or scores
    return min(full, key=lambda k: (fmean(full[k][seed] for seed in sorted(full[k])[:seeds]), k))


def sweeps() -> Iterator[tuple[str, str, str]]:
    """Yield (task, rule, kind) of every sweep over learning rates."""
    for kind, rules in (("together", ["adamw", *(r for r in RULES if r != "adamw")]), ("alone", HIDDEN_ONLY)):
        for rule in rules:
            for task in STEPS:
                yield task, rule, kind


def run(path: Path) -> None:
    """Run what is missing: AdamW first, since the others' fallback takes its best learning rate."""
    found = Sweeps(path)
    todo: list[Callable[[str, str, str], None]] = [found.search, found.repeat]
    for task in STEPS:
        for each in todo:
            each(task, "adamw", "together")
    for each in todo:
        for task, rule, kind in sweeps():
            each(task, rule, kind)
    for rule in DECAYED:
        kind = "alone" if rule in HIDDEN_ONLY else "together"
        for task in STEPS:
            k = best(found.scores(task, rule, kind))
            for decay in DECAYS:
                for seed in SEEDS:
                    found.run(task, rule, kind, k, seed, decay)


def report(path: Path) -> None:
    """Print the best learning rate of every sweep."""
    found = Sweeps(path)
    for task, rule, kind in sweeps():
        scores = found.scores(task, rule, kind)
        if scores:
            k = best(scores)
            tried = " ".join(f"{grid(each)}:{fmean(scores[each].values()):.3f}" for each in sorted(scores))
            print(f"| {task} | {rule} | {kind} | {grid(k)} | {fmean(scores[k].values()):.4f} | {tried} |")


def main() -> None:
    """Run the trials, or report them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--report", action="store_true", help="only print the best learning rates")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.report:
        print(describe(torch.device("cpu")))
        run(options.file)
    report(options.file)


if __name__ == "__main__":
    main()
