"""The course of a race: which trial comes next, a pure function of the plan and the records so far.

Trials go round by round, each optimizer once a round, so that a machine that changes its speed
changes it for all, and a race that must be cut short is cut at the end of a round: every optimizer
then has had as many trials as the others. First the rounds of the search, all with seed 0; then the
best learning rate of each again with seed 1, 2, …
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from . import search
from .plan import Plan
from .records import Assignment, Phase, Record

SEARCH_SEED = 0
LEAST_SEARCH_ROUNDS = 2
LEAST_SEEDS = 2


@dataclass(frozen=True)
class Progress:
    """Where a race stands."""

    next: Assignment | None
    """The trial to run now; None when the race is over."""
    remaining: int
    """Trials still to come, as far as is known."""
    search_rounds: int
    """Rounds of the search that were begun."""
    seeds: int
    """Seeds that were begun, the search's among them."""


def survey(plan: Plan, records: Sequence[Record]) -> Progress:
    """Find the next trial, and how far the race has come."""
    done = {record.assignment: record for record in records}
    before: list[Record] = []
    searched = 0
    for number in range(plan.request.trials):
        # A later round of the search must leave time for the second seed, which is not optional.
        if number >= LEAST_SEARCH_ROUNDS and not _affordable(plan, before, rounds=2):
            break
        searched += 1
        this: list[Record] = []
        for label in plan.labels:
            lr = search.next_lr(plan.request.optimizers[label]["lr"], tried(plan, before, label))
            assignment = Assignment("search", number, label, lr, SEARCH_SEED)
            if assignment not in done:
                left = _left(plan, "search", number, len(this))
                return Progress(assignment, left, searched, 1)
            this.append(done[assignment])
        before += this
    winners = {label: search.best_lr(tried(plan, before, label)) for label in plan.labels}
    seeds = 1
    for seed in range(1, plan.request.seeds):
        if seed >= LEAST_SEEDS and not _affordable(plan, before, rounds=1):
            break
        seeds += 1
        this = []
        for label, best in winners.items():
            if best is None:
                continue
            assignment = Assignment("seeds", seed, label, best, seed)
            if assignment not in done:
                return Progress(assignment, _left(plan, "seeds", seed, len(this)), searched, seeds)
            this.append(done[assignment])
        before += this
    return Progress(None, 0, searched, seeds)


def tried(plan: Plan, records: Sequence[Record], label: str) -> list[search.Tried]:
    """The learning rates an optimizer's search has tried, with their scores (lower is better)."""
    return [
        (record.lr, plan.score(record.metric) if record.finite else math.inf)
        for record in records
        if record.optimizer == label and record.phase == "search"
    ]


def elapsed(plan: Plan, records: Sequence[Record]) -> float:
    """Seconds the race has cost, over all its interruptions: what its setup and its trials took."""
    return plan.setup_seconds + sum(record.seconds for record in records)


def _affordable(plan: Plan, before: Sequence[Record], rounds: int) -> bool:
    """Whether as many more rounds as long as the last would end within the limit."""
    if plan.limit is None:
        return True
    last = before[-len(plan.labels) :]
    return elapsed(plan, before) + rounds * sum(record.seconds for record in last) <= plan.limit


def _left(plan: Plan, phase: Phase, number: int, done_in_round: int) -> int:
    """Trials still to come if no round is dropped, this one among them."""
    rounds = plan.request.seeds - number
    if phase == "search":
        rounds = plan.request.trials - number + plan.request.seeds - 1
    return rounds * len(plan.labels) - done_in_round
