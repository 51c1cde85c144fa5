"""The trial scheduler: which trial comes next, as a pure function of the plan and the records so far.

Trials run in rounds with one trial per optimizer. A change in the machine's speed then affects all
optimizers alike, and a race that runs out of time stops at the end of a round, when every optimizer has
had the same number of trials. The search rounds come first, all with seed 0; then each optimizer's best
learning rate runs again with seeds 1, 2, …
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from . import search
from .plan import Plan
from .records import Phase, Record, TrialSpec

SEARCH_SEED = 0
MIN_SEARCH_ROUNDS = 2
MIN_SEEDS = 2


@dataclass(frozen=True)
class Progress:
    """The state of a race."""

    next: TrialSpec | None
    """The trial to run now; None when the race is over."""
    remaining: int
    """Trials still to run, if no round is dropped."""
    search_rounds: int
    """Search rounds started."""
    seeds: int
    """Seeds started, including the search's."""


def progress(plan: Plan, records: Sequence[Record]) -> Progress:
    """Return the next trial and the number of trials that remain."""
    done = {record.trial: record for record in records}
    earlier: list[Record] = []
    searched = 0
    for number in range(plan.request.trials):
        # A search round must leave time for the second seed, which is mandatory.
        if number >= MIN_SEARCH_ROUNDS and not _fits_limit(plan, earlier, rounds=2):
            break
        searched += 1
        current: list[Record] = []
        for label in plan.labels:
            lr = search.next_lr(plan.request.optimizers[label]["lr"], lr_scores(plan, earlier, label))
            trial = TrialSpec("search", number, label, lr, SEARCH_SEED)
            if trial not in done:
                return Progress(trial, _remaining(plan, "search", number, len(current)), searched, 1)
            current.append(done[trial])
        earlier += current
    best_lrs = {label: search.best_lr(lr_scores(plan, earlier, label)) for label in plan.labels}
    seeds = 1
    for seed in range(1, plan.request.seeds):
        if seed >= MIN_SEEDS and not _fits_limit(plan, earlier, rounds=1):
            break
        seeds += 1
        current = []
        for label, best in best_lrs.items():
            if best is None:
                continue
            trial = TrialSpec("seeds", seed, label, best, seed)
            if trial not in done:
                return Progress(trial, _remaining(plan, "seeds", seed, len(current)), searched, seeds)
            current.append(done[trial])
        earlier += current
    return Progress(None, 0, searched, seeds)


def lr_scores(plan: Plan, records: Sequence[Record], label: str) -> list[search.LrScore]:
    """Return the learning rates that an optimizer's search has tried, with their scores (lower is better)."""
    return [
        (record.lr, plan.score(record.metric) if record.finite else math.inf)
        for record in records
        if record.optimizer == label and record.phase == "search"
    ]


def elapsed(plan: Plan, records: Sequence[Record]) -> float:
    """Return the seconds spent on setup and trials, over all sessions of an interrupted race."""
    return plan.setup_seconds + sum(record.seconds for record in records)


def _fits_limit(plan: Plan, earlier: Sequence[Record], rounds: int) -> bool:
    """Return whether `rounds` more rounds, each as long as the last, would end within the time limit."""
    if plan.limit is None:
        return True
    last = earlier[-len(plan.labels) :]
    return elapsed(plan, earlier) + rounds * sum(record.seconds for record in last) <= plan.limit


def _remaining(plan: Plan, phase: Phase, number: int, done_in_round: int) -> int:
    """Count the trials still to run, including the next one, if no round is dropped."""
    rounds = plan.request.seeds - number
    if phase == "search":
        rounds = plan.request.trials - number + plan.request.seeds - 1
    return rounds * len(plan.labels) - done_in_round
