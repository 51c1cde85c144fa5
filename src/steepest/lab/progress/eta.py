"""The ETA: estimate how long the rest of a race will take."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import fmean

from ..plan import Plan
from ..records import Record


class ETA:
    """Estimates from the last round's mean trial duration or, before the first trial, from the plan."""

    def __init__(self, plan: Plan, records: Sequence[Record]) -> None:
        times = plan.times
        self._planned = plan.steps * times.step_seconds + times.evaluation_seconds * (
            1 + plan.request.evaluations
        )
        self._last_round = deque((record.seconds for record in records), maxlen=len(plan.labels))

    def update(self, record: Record) -> None:
        """Take a finished trial into account."""
        self._last_round.append(record.seconds)

    def remaining_seconds(self, trials: int, done: float = 0.0) -> float:
        """Return the seconds for `trials` more trials, of which the fraction `done` of the first is over."""
        return max(0.0, trials - done) * (fmean(self._last_round) if self._last_round else self._planned)
