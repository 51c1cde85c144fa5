"""The standings as a table on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import fill

from rich.table import Table

from . import wording
from .plan import Plan
from .records import Record
from .standings import REFERENCE, Row, reference, standings, untrained

WIDE = 100
"""Columns of a terminal from which on nothing is left out."""


def table(plan: Plan, records: Sequence[Record], width: int = WIDE) -> Table:
    """A rich table of the standings, with the untrained model's metric in its caption.

    Args:
        plan: The race's plan.
        records: Its records.
        width: Columns of the terminal. Below `WIDE` the less important ones of the table's are left out.
    """
    metric = plan.request.metric
    better = "lower" if plan.request.lower_is_better else "higher"
    rows = standings(plan, records)
    like = wording.scale(plan, records)
    wide = width >= WIDE
    caption = [f"untrained: {wording.figure(untrained(records), like)}"]
    if any(row.edge is not None and row.trials > 1 for row in rows):
        caption.append(wording.EDGES)
    if not wide:
        caption.append(f"more in the report, or in a terminal {WIDE} columns wide")
    drawn = Table(
        title=f"{plan.request.task}: {metric}, {better} is better",
        caption="\n".join(caption),
        title_justify="left",
        caption_justify="left",
    )
    columns: list[tuple[str, Callable[[Row], str], bool]] = [
        (fill(metric, 14), lambda row: wording.result(row, like), True),
        ("tuned lr", wording.tuned_short, True),
        ("untuned,\nseed 0", lambda row: wording.default(row, like), wide),
        (f"steps to\n{REFERENCE}'s", lambda row: wording.catch_up(row, plan.steps), REFERENCE in plan.labels),
        ("state\nB/param", lambda row: f"{row.state_bytes_per_parameter:.2f}", True),
        ("step\nms", lambda row: f"{row.optimizer_ms:.2f}", True),
        (f"×\n{reference(plan)}", lambda row: f"{row.step_ratio:.2f}", wide),
    ]
    shown = [(header, cell) for header, cell, fits in columns if fits]
    drawn.add_column("optimizer", style="bold", no_wrap=True)
    for header, _ in shown:
        drawn.add_column(header, justify="right")
    for row in rows:
        drawn.add_row(row.optimizer, *(cell(row) for _, cell in shown))
    return drawn
