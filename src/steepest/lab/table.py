"""The standings as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from . import wording
from .plan import Plan
from .records import Record
from .standings import reference, standings, untrained


def table(plan: Plan, records: Sequence[Record]) -> Table:
    """A rich table of the standings, with the untrained model's metric in its caption."""
    metric = plan.request.metric
    better = "lower" if plan.request.lower_is_better else "higher"
    drawn = Table(
        title=f"{plan.request.task}: {metric}, {better} is better",
        caption=f"untrained: {wording.figure(untrained(records))}",
        title_justify="left",
        caption_justify="left",
    )
    drawn.add_column("optimizer", style="bold", no_wrap=True)
    drawn.add_column(metric, justify="right")
    drawn.add_column("tuned lr", justify="right")
    drawn.add_column("untuned, seed 0", justify="right")
    drawn.add_column("state B/param", justify="right")
    drawn.add_column("optimizer step", justify="right")
    drawn.add_column(f"× {reference(plan)}", justify="right")
    for row in standings(plan, records):
        drawn.add_row(
            row.optimizer,
            wording.result(row),
            wording.tuned(row),
            wording.default(row),
            f"{row.state_bytes_per_parameter:.2f}",
            f"{row.optimizer_ms:.2f} ms",
            f"{row.step_ratio:.2f}",
        )
    return drawn
