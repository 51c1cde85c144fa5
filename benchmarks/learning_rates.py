"""Sweep the learning rate of every rule on the lab's two tasks; a finished trial is a line of a file.

The learning rates lie on the grid 10^(k/4). A sweep walks in steps of √10 until the best one has a worse one
on either side, tries those between, and repeats the best and its neighbours with more seeds until the best
mean lies between worse ones. Kinds of lines:

  together  all groups of ``steepest.build(model, rule)``, in the ratio of their defaults; no weight decay
  alone     the learning rate of a rule for hidden matrices; the rest stays with AdamW at AdamW's best
  suggest   what ``steepest.suggest_lr`` suggests for all groups together, in a third of the task's steps;
            suggest_60 in 60 steps
  ramp      where the loss is lowest in a single training whose learning rate rises, for comparison

Run it again to go on where it was interrupted:

  OMP_NUM_THREADS=1 python benchmarks/learning_rates.py

The committed file was measured when the tasks held out one set of data: digits trained on 1,437 images
instead of 1,079. To measure again, start another with --file.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch import nn

import steepest
from steepest.lab.tasks import Task, digits_task, text_task
from steepest.lab.training.machine import describe
from steepest.lab.training.optimizers import OptimizerSpec
from steepest.lab.training.seeding import infinite_batches, seeded
from steepest.lab.training.trial import Trial, run_trial

FILE = Path(__file__).with_suffix(".jsonl")
# The longer run on digits is 18 epochs of 1,079 images, which a network of 4,810 parameters overfits.
STEPS = {"text": 400, "digits": 100, "digits_long": 300}
SEEDS = (0, 1, 2)
# Without the rule for ternary weights, and the base class, which has no matrix function of its own.
RULES = [name for name in steepest.list_optimizers() if name not in ("orthogonalized", "ternary_flip")]
HIDDEN_ONLY = ["hyperball", "muon", "normuon", "polargrad", "scion"]
# The learning rates of a ramp: 100 steps from 1e-6 to 100.
RAMP = [10 ** (-6 + 8 * step / 99) for step in range(100)]
OWN_DECAY = ["hyperball", "scion"]
# Where the search begins: near the best of earlier races, which saves trials and changes no result.
START = {
    "adamw": 2e-3, "ademamix": 2e-3, "hyperball": 1e-2, "lion": 5e-4, "muon": 3e-2, "normuon": 3e-2,
    "polargrad": 1e-1, "procrustes": 2e-2, "quad": 2e-2, "scion": 3e-2, "sgd": 3e-1, "sgd_sai": 3e-3,
    "signgsd": 1e-3, "simba": 1e-3, "simba_leaky": 1e-3, "soap": 1e-2,
}  # fmt: skip

Scores = dict[int, dict[int, float]]
"""The score by the learning rate's place k in the grid, and by the seed; lower is better."""


def task_of(name: str) -> Task[Any]:
    """Return the task, of 0.27 million parameters on text; trials are judged by it after their last step."""
    task: Task[Any] = text_task(width=96) if name == "text" else digits_task()
    return replace(task, evaluations=1)


def grid(k: int) -> float:
    """Return the learning rate at place k of the grid, in two digits."""
    return float(f"{10 ** (k / 4):.1e}")


def place(lr: float) -> int:
    """Return the place of the nearest learning rate, an even one: the grid in steps of √10."""
    return 2 * round(2 * math.log10(lr))


@dataclass
class Sweeps:
    """The file's trials, and the means to run more.

    Args:
        path: the file.
        steps: how many steps a trial takes, by the task's name.
        make_task: returns the task of a name.
    """

    path: Path
    steps: Mapping[str, int] = field(default_factory=lambda: STEPS)
    make_task: Callable[[str], Task[Any]] = task_of
    tasks: dict[str, Task[Any]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.rows = [json.loads(line) for line in self.path.read_text().splitlines()]

    def scores(self, task: str, rule: str, kind: str) -> Scores:
        """Return the scores of a sweep; infinite where training diverged."""
        found: Scores = {}
        for row in self.rows:
            if (row["task"], row["rule"], row["kind"]) == (task, rule, kind):
                score = math.inf if row["metric"] is None else row["metric"]
                found.setdefault(round(4 * math.log10(row["lr"])), {})[row["seed"]] = score
        return found

    def run(self, task: str, rule: str, kind: str, k: int, seed: int) -> None:
        """Run one trial and append it to the file, unless it is there."""
        if seed in self.scores(task, rule, kind).get(k, {}):
            return
        alone = grid(best(self.scores(task, "adamw", "together"))) if kind == "alone" else None

        def builder(model: nn.Module, values: Mapping[str, Any]) -> torch.optim.Optimizer:
            if alone is not None:
                return build(model, rule, lr=grid(k), fallback_lr=alone)
            optimizer = build(model, rule)
            factor = grid(k) / optimizer.param_groups[0]["lr"]
            for group in optimizer.param_groups:
                group["lr"] *= factor
            return optimizer

        problem = self.task(task)
        trial = Trial(rule, "search", seed, {}, self.steps[task])
        record = run_trial(problem, OptimizerSpec(rule, builder, {"lr": grid(k)}), trial)
        metric = record.validated(problem.metric.name) if record.finished else None
        self.append(task, rule, kind, grid(k), seed, fallback_lr=alone, steps=trial.steps, metric=metric)

    def task(self, name: str) -> Task[Any]:
        """Return the task, which is loaded once."""
        if name not in self.tasks:
            self.tasks[name] = self.make_task(name)
        return self.tasks[name]

    def append(self, task: str, rule: str, kind: str, lr: float, seed: int, **more: Any) -> None:
        """Append a line to the file."""
        row = {"task": task, "rule": rule, "kind": kind, "lr": lr, "seed": seed, **more}
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(task, rule, kind, lr, f"seed {seed}", more.get("metric", ""), flush=True)

    def search(self, task: str, rule: str, kind: str) -> None:
        """Search with the first seed until the best learning rate lies between two worse neighbours."""
        k = place(START.get(rule, 1e-3))
        for step in (2, 1):
            while True:
                for each in (k, k + step, k - step):
                    self.run(task, rule, kind, each, SEEDS[0])
                scores = {
                    each: {SEEDS[0]: seeds[SEEDS[0]]} for each, seeds in self.scores(task, rule, kind).items()
                }
                if best(scores) == k:
                    break
                k = best(scores)

    def repeat(self, task: str, rule: str, kind: str, seeds: Sequence[int]) -> None:
        """Repeat the best learning rate and its neighbours until the best mean is interior."""
        k = best(self.scores(task, rule, kind))
        while True:
            for each in (k, k + 1, k - 1):
                for seed in seeds:
                    self.run(task, rule, kind, each, seed)
            best_k = best(self.scores(task, rule, kind))
            if best_k == k:
                return
            k = best_k

    def has(self, task: str, rule: str, kind: str, seed: int) -> bool:
        """Return whether the file has such a line."""
        wanted = (task, rule, kind, seed)
        return any((row["task"], row["rule"], row["kind"], row["seed"]) == wanted for row in self.rows)

    def ramp(self, task: str, rule: str, seed: int) -> None:
        """Append the losses of a single training whose learning rate rises, unless they are there."""
        if self.has(task, rule, "ramp", seed):
            return
        problem, losses = self.task(task), []
        with seeded(seed):
            model = problem.make(seed)
            optimizer, batches = build(model, rule), infinite_batches(problem, seed)
            first = optimizer.param_groups[0]["lr"]
            ratios = [group["lr"] / first for group in optimizer.param_groups]
            for lr in RAMP:
                for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                    group["lr"] = lr * ratio
                optimizer.zero_grad()
                loss = problem.loss(model, next(batches))
                if not loss.item() < 11 * (losses[0] if losses else math.inf):
                    break
                losses.append(round(loss.item(), 4))
                loss.backward()
                optimizer.step()
        self.append(task, rule, "ramp", ramp_lr(losses), seed, losses=losses)

    def suggest(self, task: str, rule: str, seed: int, kind: str, steps: int) -> None:
        """Append what ``suggest_lr`` suggests, unless it is there."""
        if self.has(task, rule, kind, seed):
            return
        problem = self.task(task)
        with seeded(seed):
            model = problem.make(seed)
            batches = infinite_batches(problem, seed)
            suggestion = steepest.suggest_lr(model, build(model, rule), batches, problem.loss, steps=steps)
        lrs, losses = suggestion.lrs, [None if math.isinf(loss) else loss for loss in suggestion.losses]
        initial = suggestion.initial_loss
        self.append(task, rule, kind, suggestion.lr, seed, initial=initial, lrs=lrs, losses=losses)


def ramp_lr(losses: list[float]) -> float:
    """Return where the loss of a ramp, averaged with a momentum of 0.9, is lowest."""
    average, smooth = 0.0, []
    for step, loss in enumerate(losses, 1):
        average = 0.9 * average + 0.1 * loss
        smooth.append(average / (1 - 0.9**step))
    return RAMP[smooth.index(min(smooth))]


def build(model: nn.Module, rule: str, **options: Any) -> steepest.Optimizer:
    """Build without weight decay, where it is no part of the rule."""
    return steepest.build(model, rule, **({} if rule in OWN_DECAY else {"weight_decay": 0.0}), **options)


def best(scores: Scores) -> int:
    """Return the place of the lowest mean, among those with the most seeds."""
    most = max(map(len, scores.values()))
    return min((k for k in scores if len(scores[k]) == most), key=lambda k: (fmean(scores[k].values()), k))


def sweeps() -> Iterator[tuple[str, str, str]]:
    """Yield (task, rule, kind) of every sweep over learning rates."""
    for kind, rules in (("together", ["adamw", *(r for r in RULES if r != "adamw")]), ("alone", HIDDEN_ONLY)):
        for rule in rules:
            for task in STEPS:
                yield task, rule, kind


def run(path: Path) -> None:
    """Run what is missing: AdamW first, since the others' fallback takes its best learning rate."""
    found = Sweeps(path)
    for task in STEPS:
        found.search(task, "adamw", "together")
        found.repeat(task, "adamw", "together", SEEDS)
    for task, rule, kind in sweeps():
        found.search(task, rule, kind)
    for rule in RULES:
        for task in ("text", "digits"):
            found.ramp(task, rule, SEEDS[0])
            for seed in SEEDS[:2]:
                found.suggest(task, rule, seed, "suggest", STEPS[task] // 3)
                found.suggest(task, rule, seed, "suggest_60", 60)
    for seeds in range(2, len(SEEDS) + 1):
        for task, rule, kind in sweeps():
            found.repeat(task, rule, kind, SEEDS[:seeds])


def report(path: Path) -> None:
    """Print the tables of docs/learning_rates.md: best learning rates, multipliers, suggestions."""
    found = Sweeps(path)
    kinds = {rule: "alone" if rule in HIDDEN_ONLY else "together" for rule in RULES}
    print(
        "| rule | " + " | ".join(f"best lr, {task}" for task in STEPS) + " |\n| --- |" + " --- |" * len(STEPS)
    )
    for rule in RULES:
        cells = [best_words(found.scores(task, rule, "together")) for task in STEPS]
        print(f"| `{rule}` | {' | '.join(cells)} |")
    print("\nmultipliers of AdamW's learning rate, on text and on digits")
    for rule, kind in kinds.items():
        factors = []
        for task in ("text", "digits"):
            scores = found.scores(task, rule, kind)
            own = found.scores(task, "adamw", "together")
            factors.append(f"{grid(best(scores)) / grid(best(own)):.2g}" if scores else "")
        print(f"{rule}: {', '.join(factors)}")
    for kind in ("suggest", "suggest_60", "ramp"):
        ratios = {
            (row["task"], row["rule"], row["seed"]): row["lr"]
            / grid(best(found.scores(row["task"], row["rule"], "together")))
            for row in found.rows
            if row["kind"] == kind
        }
        middle = median(ratios.values()) if kind == "ramp" else 1.0
        print(f"\n{kind}: {min(ratios.values()):.2f} to {max(ratios.values()):.2f} times the best")
        missed = {key: ratio for key, ratio in ratios.items() if not 1 / 3 <= ratio / middle <= 3}
        print(f"over {middle:.2g}, beyond a factor of 3: {len(missed)} of {len(ratios)}")
        for (task, rule, seed), ratio in missed.items():
            print(f"{task}, {rule}, seed {seed}: {ratio:.2f}")


def best_words(scores: Scores) -> str:
    """Return the best learning rate, with its score's mean and standard deviation over the seeds."""
    if not scores:
        return ""
    seeds = list(scores[best(scores)].values())
    spread = f" ± {stdev(seeds):.3f}" if len(seeds) > 1 else ""
    return f"{grid(best(scores)):g} ({fmean(seeds):.3f}{spread})"


def command(
    description: str | None, file: Path, run: Callable[[Path], None], report: Callable[[Path], None]
) -> None:
    """Run the trials that a file lacks, and report them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--file", type=Path, default=file)
    parser.add_argument("--report", action="store_true", help="only print the best learning rates")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.report:
        print(describe(torch.device("cpu")))
        run(options.file)
    report(options.file)


if __name__ == "__main__":
    command(__doc__, FILE, run, report)
