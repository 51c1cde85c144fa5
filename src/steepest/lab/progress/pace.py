"""How long the rest of a race will take."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import fmean

from ..plan import Plan
from ..records import Record


class Pace:
    """The duration of a trial: the plan's estimate at first, then the mean of the last round."""

    def __init__(self, plan: Plan, records: Sequence[Record]) -> None:
        times = plan.times
        self._planned = plan.steps * times.step_seconds + times.evaluation_seconds * (
            1 + plan.request.evaluations
        )
        self._last = deque((record.seconds for record in records), maxlen=len(plan.labels))

    def finished(self, record: Record) -> None:
        """Learn from a finished trial."""
        self._last.append(record.seconds)

    def left(self, trials: int, done: float = 0.0) -> float:
        """Seconds that `trials` more will take, a share `done` of the first being over."""
        return max(0.0, trials - done) * (fmean(self._last) if self._last else self._planned)
