"""How the best learning rate moves with the batch size, for every rule, on the lab's two tasks.

The search is that of `learning_rates.py`: the grid 10^(k/4), all groups of ``steepest.build(model, rule)``
scaled together, no weight decay, until the best rate has worse neighbours in the mean over all seeds. Runs of
different batches have the same number of steps, so a larger batch sees more data.

Run it again to go on where it was interrupted:

  OMP_NUM_THREADS=1 python -m benchmarks.batch_size
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.learning_rates import RULES, Sweeps, best, best_words, command, grid
from steepest.lab.tasks import Task, digits_task, text_task

FILE = Path(__file__).with_suffix(".jsonl")
BATCHES = {"digits": (16, 64, 256), "text": (8, 32)}
# On text a trial takes a hundred times as long, so there only one rule of each kind is searched.
SEARCHED = {"digits": RULES, "text": ["adamw", "muon", "sgd_sai", "signgsd", "quad", "simba"]}
SEEDS = {"digits": range(5), "text": range(3)}
STEPS = {f"{task}, {batch}": 100 if task == "digits" else 400 for task in BATCHES for batch in BATCHES[task]}


def task_of(name: str) -> Task[Any]:
    """Return the task with the batch in its name, on text with 0.13 million parameters."""
    task, batch = name.split(", ")
    made: Task[Any] = (
        digits_task(batch=int(batch)) if task == "digits" else text_task(width=64, batch=int(batch))
    )
    return replace(made, evaluations=1)


def run(path: Path) -> None:
    """Run what is missing, a task and a rule after the other."""
    found = Sweeps(path, STEPS, task_of)
    for task, batches in BATCHES.items():
        for rule in SEARCHED[task]:
            for name in (f"{task}, {batch}" for batch in batches):
                found.search(name, rule, "together")
                found.repeat(name, rule, "together", SEEDS[task])


def report(path: Path) -> None:
    """Print the table of docs/learning_rates.md: the best rates, and their ratios between batches."""
    found = Sweeps(path, STEPS, task_of)
    for task, batches in BATCHES.items():
        ratio = f"× lr, {batches[0]} to {batches[-1]}"
        print("| rule | " + " | ".join([*(f"{task}, batch of {batch}" for batch in batches), ratio]) + " |")
        print("| --- |" + " --- |" * (len(batches) + 1))
        for rule in SEARCHED[task]:
            scores = [found.scores(f"{task}, {batch}", rule, "together") for batch in batches]
            smallest, largest = scores[0], scores[-1]
            moved = f"{grid(best(largest)) / grid(best(smallest)):.2g}" if smallest and largest else ""
            print(f"| `{rule}` | {' | '.join([*map(best_words, scores), moved])} |")
        print()


if __name__ == "__main__":
    command(__doc__, FILE, run, report)
