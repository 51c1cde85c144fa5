"""A line for every finished trial, for log files and pipes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from ..records import Experiment, Record
from ..training.clock import format_duration
from .callback import Callback
from .state import State, outcome, settings


class Plain(Callback):
    """Writes to `stream`, by default standard output."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream

    def message(self, text: str) -> None:
        """Write the message."""
        print(text, file=self._stream, flush=True)

    def on_start(self, experiment: Experiment, records: Sequence[Record]) -> None:
        """Write the number of trials."""
        self._state = State(experiment, records)
        done = f", {len(records)} of them already done" if records else ""
        self.message(f"{experiment.title}: {self._state.total} trials of {experiment.steps} steps{done}")

    def on_trial_end(self, record: Record) -> None:
        """Write the result and the remaining time."""
        state = self._state
        state.records.append(record)
        self.message(
            f"[{len(state.records)}/{state.total}] {record.optimizer} {record.phase} seed {record.seed}, "
            f"{settings(record.searched)}: {outcome(state.experiment, record)} in {record.seconds:.1f} s, "
            f"about {format_duration(state.remaining_seconds())} left"
        )
