"""The callback interface: `race` reports its progress through it."""

from __future__ import annotations

from collections.abc import Sequence

from ..plan import Plan
from ..records import Record, TrialSpec
from ..trial_scheduler import Progress


class Callback:
    """Base class that ignores every event. `race` calls the methods in this order; `message` at any time."""

    def message(self, text: str) -> None:
        """Handle a message for the user."""

    def on_start(self, plan: Plan, records: Sequence[Record]) -> None:
        """Handle the start of the race; `records` are the trials that an earlier run has finished."""

    def on_trial_start(self, trial: TrialSpec, progress: Progress) -> None:
        """Handle the start of a trial."""

    def on_step(self, step: int, loss: float) -> None:
        """Handle a point of the training curve; `loss` is the mean since the previous point."""

    def on_trial_end(self, record: Record) -> None:
        """Handle the end of a trial, whose record is already on the disk."""

    def on_end(self) -> None:
        """Handle the end of the race: all trials finished, an interrupt, or an error."""
