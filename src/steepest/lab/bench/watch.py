"""Watching a benchmark: silently, in plain lines, or as a bar on a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class Watcher(Protocol):
    """Told of everything as it happens."""

    def note(self, text: str) -> None:
        """Something worth saying, at any time."""

    def planned(self, pieces: int) -> None:
        """So many pieces of work will come."""

    def begun(self, what: str) -> None:
        """A piece of work begins."""

    def ticked(self, share: float) -> None:
        """Such a share of it is done, from 0 to 1."""

    def finished(self) -> None:
        """It is over."""

    def closed(self) -> None:
        """Nothing more will come."""


class Silent:
    """Watches and says nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def planned(self, pieces: int) -> None:
        """Say nothing."""

    def begun(self, what: str) -> None:
        """Say nothing."""

    def ticked(self, share: float) -> None:
        """Say nothing."""

    def finished(self) -> None:
        """Say nothing."""

    def closed(self) -> None:
        """Say nothing."""


class Plain(Silent):
    """A line for every piece of work, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._pieces = self._done = 0

    def note(self, text: str) -> None:
        """Write it."""
        print(text, file=self._stream, flush=True)

    def planned(self, pieces: int) -> None:
        """Remember how many."""
        self._pieces = pieces

    def begun(self, what: str) -> None:
        """Write what begins."""
        self._done += 1
        self.note(f"[{self._done}/{self._pieces}] {what}")


class Live(Silent):
    """A bar with the piece of work that is going on and the time that has passed."""

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

    def note(self, text: str) -> None:
        """Print it above the bar."""
        self._progress.console.print(text, highlight=False, soft_wrap=True)

    def planned(self, pieces: int) -> None:
        """Draw the bar."""
        self._task = self._progress.add_task("", total=pieces)
        self._progress.start()

    def begun(self, what: str) -> None:
        """Name the work."""
        if self._task is not None:
            self._progress.update(self._task, description=what)

    def ticked(self, share: float) -> None:
        """Move the bar a little."""
        if self._task is not None:
            self._progress.update(self._task, completed=self._done + share)

    def finished(self) -> None:
        """Move it to the next piece."""
        self._done += 1
        if self._task is not None:
            self._progress.update(self._task, completed=self._done)

    def closed(self) -> None:
        """Take it away."""
        self._progress.stop()
