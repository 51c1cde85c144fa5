"""A text log with a line for every finished trial, for log files and pipes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from .. import formatting
from ..clock import format_duration
from ..plan import Plan
from ..records import Record, TrialSpec
from ..trial_scheduler import Progress
from .callback import Callback
from .eta import ETA


class TextLog(Callback):
    """Writes a line per event to `stream`, by default standard output."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._done = 0
        self._scale = 0.0
        self._progress: Progress | None = None

    def message(self, text: str) -> None:
        """Write the message."""
        print(text, file=self._stream, flush=True)

    def on_start(self, plan: Plan, records: Sequence[Record]) -> None:
        """Write the number of trials."""
        self._plan = plan
        self._eta = ETA(plan, records)
        self._done = len(records)
        self.message(
            f"{plan.max_trials} trials of {plan.steps} steps"
            + (f", {self._done} of them already done" if self._done else "")
        )

    def on_trial_start(self, trial: TrialSpec, progress: Progress) -> None:
        """Remember how many trials remain."""
        self._progress = progress

    def on_trial_end(self, record: Record) -> None:
        """Write the result and the remaining time."""
        assert self._progress is not None
        self._done += 1
        self._eta.update(record)
        remaining = self._progress.remaining - 1
        eta = format_duration(self._eta.remaining_seconds(remaining))
        result = "diverged"
        if record.finite:
            # The largest metric so far sets the decimals; trials worse than untrained do not count.
            untrained = record.validation[0][2]
            if self._plan.score(record.metric) <= self._plan.score(untrained):
                self._scale = max(self._scale, abs(record.metric), abs(untrained))
            result = f"{formatting.metric(record.metric, self._scale)} {self._plan.request.unit}".strip()
        self.message(
            f"[{self._done}/{self._done + remaining}] {record.optimizer} lr {record.lr:g} "
            f"seed {record.seed}: {result} in {record.seconds:.1f} s, "
            + (f"about {eta} left" if remaining else "the last")
        )
