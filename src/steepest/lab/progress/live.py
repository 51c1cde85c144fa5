"""A table that fills in while the race runs, with the time left."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .. import search, wording
from ..clock import span
from ..course import Progress, tried
from ..plan import Plan
from ..records import Assignment, Record
from ..standings import winners
from .pace import Pace

_WIDE = 100
_ODD_LR = "lr 0.00032"


class Live:
    """Redraws one table on `console` as trials go on."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = Console() if console is None else console
        self._live: RichLive | None = None
        self._records: list[Record] = []
        self._running: Assignment | None = None
        self._step = 0
        self._loss: float | None = None
        self._like = 0.0

    def note(self, text: str) -> None:
        """Print the note above the table."""
        self._console.print(text, highlight=False)

    def planned(self, plan: Plan, records: Sequence[Record]) -> None:
        """Draw the table."""
        self._plan = plan
        self._records = list(records)
        self._pace = Pace(plan, records)
        self._remaining = plan.most_trials - len(records)
        self._live = RichLive(console=self._console, refresh_per_second=4, get_renderable=self.draw)
        self._live.start()

    def begun(self, assignment: Assignment, progress: Progress) -> None:
        """Mark the trial as running."""
        self._running, self._remaining = assignment, progress.remaining
        self._step, self._loss = 0, None

    def ticked(self, step: int, loss: float) -> None:
        """Show the current loss."""
        self._step, self._loss = step, loss

    def finished(self, record: Record) -> None:
        """Show the result."""
        self._records.append(record)
        self._pace.finished(record)
        self._running = None
        self._remaining -= 1

    def closed(self) -> None:
        """Take the table away: the standings follow, or the shell's prompt."""
        if self._live is not None:
            self._live.transient = self._running is None
            self._live.stop()
            self._live = None

    def draw(self) -> Group:
        """The table and the line below it, as they stand now."""
        asked = self._plan.request
        grid = Table(title=f"race: {asked.task}, {asked.metric}", title_justify="left")
        grid.add_column("optimizer", style="bold", no_wrap=True, max_width=24)
        grid.add_column("trials", justify="right")
        # As wide as it can get, so that the table stands still while the trial goes on.
        grid.add_column(
            "now", no_wrap=True, min_width=len(f"{_ODD_LR}, seed {asked.seeds - 1}, {self._at()}")
        )
        grid.add_column("loss", justify="right", min_width=6)
        grid.add_column("best", justify="right", min_width=6)
        wide = self._console.width >= _WIDE
        self._like = wording.scale(self._plan, self._records)
        if wide:
            grid.add_column("at lr", justify="right", min_width=len(_ODD_LR) - 3)
        for label in self._plan.labels:
            cells = self._row(label)
            grid.add_row(*(cells if wide else cells[:-1]))
        return Group(grid, self._footer())

    def _at(self) -> str:
        steps = str(self._plan.steps)
        return f"{self._step:>{len(steps)}}/{steps}"

    def _row(self, label: str) -> tuple[str, str, str, str, str, str]:
        of_label = [record for record in self._records if record.optimizer == label]
        best = search.best_lr(tried(self._plan, self._records, label))
        at_best = [record.metric for record in winners(self._plan, self._records, label) if record.finite]
        now, loss = "", ""
        if self._running is not None and self._running.optimizer == label:
            now = f"lr {self._running.lr:g}, seed {self._running.seed}, {self._at()}"
            loss = "" if self._loss is None else f"{self._loss:.3f}"
        return (
            label,
            str(len(of_label)),
            now,
            loss,
            wording.figure(sum(at_best) / len(at_best), self._like) if at_best else "",
            "" if best is None else f"{best:g}",
        )

    def _footer(self) -> Table:
        share = self._step / self._plan.steps if self._running is not None else 0.0
        done = len(self._records)
        total = done + self._remaining
        footer = Table.grid(padding=(0, 2))
        footer.add_row(
            ProgressBar(total=max(total, 1), completed=done + share, width=_bar_width(self._console.width)),
            Text(f"{done}/{total} trials"),
            Text(f"about {span(self._pace.left(self._remaining, share))} left"),
        )
        return footer


def _bar_width(columns: int) -> int:
    """What the words beside the bar leave of a line, 40 at most."""
    return max(4, min(40, columns - 44))
