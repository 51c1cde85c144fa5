"""A line for every finished trial, for logs and pipes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from .. import wording
from ..clock import span
from ..course import Progress
from ..plan import Plan
from ..records import Assignment, Record
from .pace import Pace


class Plain:
    """Writes one line per event to `stream`, by default standard output."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._done = 0
        self._like = 0.0
        self._progress: Progress | None = None

    def note(self, text: str) -> None:
        """Write the note."""
        print(text, file=self._stream, flush=True)

    def planned(self, plan: Plan, records: Sequence[Record]) -> None:
        """Write how long the race will be."""
        self._plan = plan
        self._pace = Pace(plan, records)
        self._done = len(records)
        self.note(
            f"{plan.most_trials} trials of {plan.steps} steps"
            + (f", {self._done} of them done before" if self._done else "")
        )

    def begun(self, assignment: Assignment, progress: Progress) -> None:
        """Remember how many trials remain."""
        self._progress = progress

    def ticked(self, step: int, loss: float) -> None:
        """Write nothing: a log wants results."""

    def finished(self, record: Record) -> None:
        """Write the result and the time left."""
        assert self._progress is not None
        self._done += 1
        self._pace.finished(record)
        remaining = self._progress.remaining - 1
        left = f"about {span(self._pace.left(remaining))} left" if remaining else "the last"
        outcome = "diverged"
        if record.finite:
            # The decimals of the largest so far, of those that have learnt anything.
            level = self._plan.score(record.validation[0][2])
            if self._plan.score(record.metric) <= level:
                self._like = max(self._like, abs(record.metric), abs(level))
            outcome = f"{wording.figure(record.metric, self._like)} {self._plan.request.unit}".strip()
        self.note(
            f"[{self._done}/{self._done + remaining}] {record.optimizer} lr {record.lr:g} "
            f"seed {record.seed}: {outcome} in {record.seconds:.1f} s, {left}"
        )

    def closed(self) -> None:
        """Nothing to put away."""
