"""A live table on the terminal that fills in while the race runs, with the remaining time."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .. import formatting, search
from ..clock import format_duration
from ..plan import Plan
from ..ranking import tuned_trials
from ..records import Record, TrialSpec
from ..trial_scheduler import Progress, lr_scores
from .callback import Callback
from .eta import ETA

_WIDE = 100
_LONG_LR = "lr 0.00032"


class LiveTable(Callback):
    """Redraws one table on `console` during the race."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = Console() if console is None else console
        self._live: Live | None = None
        self._records: list[Record] = []
        self._running: TrialSpec | None = None
        self._step = 0
        self._loss: float | None = None
        self._scale = 0.0

    def message(self, text: str) -> None:
        """Print the message above the table."""
        self._console.print(text, highlight=False)

    def on_start(self, plan: Plan, records: Sequence[Record]) -> None:
        """Draw the table."""
        self._plan = plan
        self._records = list(records)
        self._eta = ETA(plan, records)
        self._remaining = plan.max_trials - len(records)
        self._live = Live(console=self._console, refresh_per_second=4, get_renderable=self.draw)
        self._live.start()

    def on_trial_start(self, trial: TrialSpec, progress: Progress) -> None:
        """Mark the trial as running."""
        self._running, self._remaining = trial, progress.remaining
        self._step, self._loss = 0, None

    def on_step(self, step: int, loss: float) -> None:
        """Show the current loss."""
        self._step, self._loss = step, loss

    def on_trial_end(self, record: Record) -> None:
        """Show the result."""
        self._records.append(record)
        self._eta.update(record)
        self._running = None
        self._remaining -= 1

    def on_end(self) -> None:
        """Stop redrawing; erase the table unless a trial was interrupted, because the ranking follows."""
        if self._live is not None:
            self._live.transient = self._running is None
            self._live.stop()
            self._live = None

    def draw(self) -> Group:
        """Return the table and the progress line as they are now."""
        request = self._plan.request
        grid = Table(title=f"race: {request.task}, {request.metric}", title_justify="left")
        grid.add_column("optimizer", style="bold", no_wrap=True, max_width=24)
        grid.add_column("trials", justify="right")
        # Reserve the maximum width, so that the table does not resize during a trial.
        longest = f"{_LONG_LR}, seed {request.seeds - 1}, {self._steps()}"
        grid.add_column("now", no_wrap=True, min_width=len(longest))
        grid.add_column("loss", justify="right", min_width=6)
        grid.add_column("best", justify="right", min_width=6)
        wide = self._console.width >= _WIDE
        self._scale = formatting.metric_scale(self._plan, self._records)
        if wide:
            grid.add_column("at lr", justify="right", min_width=len(_LONG_LR) - 3)
        for label in self._plan.labels:
            cells = self._row(label)
            grid.add_row(*(cells if wide else cells[:-1]))
        return Group(grid, self._footer())

    def _steps(self) -> str:
        steps = str(self._plan.steps)
        return f"{self._step:>{len(steps)}}/{steps}"

    def _row(self, label: str) -> tuple[str, str, str, str, str, str]:
        trials = sum(record.optimizer == label for record in self._records)
        best = search.best_lr(lr_scores(self._plan, self._records, label))
        tuned = [r.metric for r in tuned_trials(self._plan, self._records, label) if r.finite]
        now, loss = "", ""
        if self._running is not None and self._running.optimizer == label:
            now = f"lr {self._running.lr:g}, seed {self._running.seed}, {self._steps()}"
            loss = "" if self._loss is None else f"{self._loss:.3f}"
        return (
            label,
            str(trials),
            now,
            loss,
            formatting.metric(sum(tuned) / len(tuned), self._scale) if tuned else "",
            "" if best is None else f"{best:g}",
        )

    def _footer(self) -> Table:
        fraction = self._step / self._plan.steps if self._running is not None else 0.0
        eta = format_duration(self._eta.remaining_seconds(self._remaining, fraction))
        done = len(self._records)
        total = done + self._remaining
        footer = Table.grid(padding=(0, 2))
        footer.add_row(
            ProgressBar(
                total=max(total, 1), completed=done + fraction, width=_bar_width(self._console.width)
            ),
            Text(f"{done}/{total} trials"),
            Text(f"about {eta} left"),
        )
        return footer


def _bar_width(columns: int) -> int:
    """Return the width that the text beside the bar leaves free, at most 40."""
    return max(4, min(40, columns - 44))
