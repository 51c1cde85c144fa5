"""The one progress interface: experiments report to it, displays implement it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..records import Experiment, Record
    from ..training.trial import Trial


class Callback:
    """Base class that ignores every event. They come in this order; `message` at any time."""

    def message(self, text: str) -> None:
        """Handle a message for the user."""

    def on_start(self, experiment: Experiment, records: Sequence[Record]) -> None:
        """Handle the start; `records` are the trials that are already finished."""

    def on_trial_start(self, trial: Trial) -> None:
        """Handle the start of a trial of this worker."""

    def on_step(self, step: int, loss: float) -> None:
        """Handle a point of the training loss, the mean since the previous point."""

    def on_trial_end(self, record: Record) -> None:
        """Handle the end of a trial."""

    def on_end(self) -> None:
        """Handle the end: all trials finished, an interrupt, or an error."""


class Several(Callback):
    """Passes every event to several callbacks, in their order."""

    def __init__(self, *callbacks: Callback) -> None:
        for event in [name for name in vars(Callback) if not name.startswith("_")]:

            def pass_on(*arguments: Any, event: str = event) -> None:
                for callback in callbacks:
                    getattr(callback, event)(*arguments)

            setattr(self, event, pass_on)
