"""Callbacks of a benchmark: silent, a text log, or a progress bar on a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class Callback:
    """Base class that ignores every event."""

    def on_start(self, work_units: int) -> None:
        """Handle the start of the run, with the number of work units of all sections."""

    def on_unit_start(self, description: str) -> None:
        """Handle the start of a work unit."""

    def on_progress(self, fraction: float) -> None:
        """Handle progress within the current work unit, from 0 to 1."""

    def on_unit_end(self) -> None:
        """Handle the end of a work unit."""

    def on_end(self) -> None:
        """Handle the end of the run."""


class TextLog(Callback):
    """Writes a line for every work unit, for log files and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._total = self._started = 0

    def on_start(self, work_units: int) -> None:
        """Store the number of work units."""
        self._total = work_units

    def on_unit_start(self, description: str) -> None:
        """Write the description."""
        self._started += 1
        print(f"[{self._started}/{self._total}] {description}", file=self._stream, flush=True)


class ProgressBar(Callback):
    """Shows the current work unit and the elapsed time."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._done = 0
        self._task: TaskID | None = None
        self._progress: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )

    def on_start(self, work_units: int) -> None:
        """Draw the bar."""
        self._task = self._progress.add_task("", total=work_units)
        self._progress.start()

    def on_unit_start(self, description: str) -> None:
        """Show the description."""
        if self._task is not None:
            self._progress.update(self._task, description=description)

    def on_progress(self, fraction: float) -> None:
        """Advance the bar within the work unit."""
        if self._task is not None:
            self._progress.update(self._task, completed=self._done + fraction)

    def on_unit_end(self) -> None:
        """Advance the bar to the next work unit."""
        self._done += 1
        if self._task is not None:
            self._progress.update(self._task, completed=self._done)

    def on_end(self) -> None:
        """Remove the bar."""
        self._progress.stop()
