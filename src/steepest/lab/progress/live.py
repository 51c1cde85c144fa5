"""A live table on the terminal, with the remaining time."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..records import Experiment, Record
from ..training.clock import format_duration
from ..training.trial import Trial
from .callback import Callback
from .state import State, outcome, settings


class Live(Callback):
    """Redraws one table on `console` while an experiment runs."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = Console(emoji=False, markup=False) if console is None else console
        self._live: RichLive | None = None
        self._trial: Trial | None = None
        self._step, self._loss = 0, 0.0

    def message(self, text: str) -> None:
        """Print the message above the table."""
        self._console.print(text, highlight=False)

    def on_start(self, experiment: Experiment, records: Sequence[Record]) -> None:
        """Draw the table."""
        self._state = State(experiment, records)
        self._live = RichLive(
            console=self._console, refresh_per_second=4, get_renderable=self.draw, transient=True
        )
        self._live.start()

    def on_trial_start(self, trial: Trial) -> None:
        """Mark the trial as running."""
        self._trial, self._step, self._loss = trial, 0, float("nan")

    def on_step(self, step: int, loss: float) -> None:
        """Show the current loss."""
        self._step, self._loss = step, loss

    def on_trial_end(self, record: Record) -> None:
        """Show the result."""
        self._state.records.append(record)
        self._trial = None

    def on_end(self) -> None:
        """Erase the table; the ranking follows."""
        if self._live is not None:
            self._live.stop()

    def draw(self) -> Group:
        """Return the table and the progress line as they are now."""
        state, trial = self._state, self._trial
        table = Table(title=state.experiment.title, title_justify="left")
        table.add_column("optimizer", style="bold", no_wrap=True)
        table.add_column("trials", justify="right")
        # Columns that keep their widths look calmer, but a narrow terminal would cut them off.
        wide = self._console.width >= 110
        table.add_column("best so far, on validation data", min_width=30 if wide else None)
        table.add_column("now", min_width=36 if wide else None)
        for label in state.experiment.optimizers:
            best = state.best(label)
            found = f"{outcome(state.experiment, best)} at {settings(best.searched)}" if best else ""
            now = ""
            if trial is not None and trial.optimizer == label:
                now = f"{trial.phase} seed {trial.seed}, {settings(trial.values)}: loss {self._loss:.3f}"
            table.add_row(label, str(sum(r.optimizer == label for r in state.records)), found, now)
        fraction = 0.0 if trial is None else self._step / trial.steps
        done = len(state.records)
        footer = Table.grid(padding=(0, 2))
        footer.add_row(
            ProgressBar(total=max(1, state.total), completed=done + fraction, width=30),
            Text(f"{done}/{state.total} trials"),
            Text(f"about {format_duration(state.remaining_seconds(fraction))} left"),
        )
        return Group(table, footer)
