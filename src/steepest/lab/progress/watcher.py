"""What a race tells whoever watches it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..course import Progress
from ..plan import Plan
from ..records import Assignment, Record


class Watcher(Protocol):
    """Told of everything as it happens. `race` calls the methods in this order."""

    def note(self, text: str) -> None:
        """Something worth saying, at any time."""

    def planned(self, plan: Plan, records: Sequence[Record]) -> None:
        """The plan stands; `records` are the trials an earlier run has finished."""

    def begun(self, assignment: Assignment, progress: Progress) -> None:
        """A trial begins."""

    def ticked(self, step: int, loss: float) -> None:
        """The trial has come to `step`; `loss` is its training loss, the mean since the last tick."""

    def finished(self, record: Record) -> None:
        """The trial is over and on the disk."""

    def closed(self) -> None:
        """Nothing more will come: the race is over, interrupted or broken off by an error."""


class Silent:
    """Watches and says nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def planned(self, plan: Plan, records: Sequence[Record]) -> None:
        """Say nothing."""

    def begun(self, assignment: Assignment, progress: Progress) -> None:
        """Say nothing."""

    def ticked(self, step: int, loss: float) -> None:
        """Say nothing."""

    def finished(self, record: Record) -> None:
        """Say nothing."""

    def closed(self) -> None:
        """Say nothing."""
