"""The ranking as a table on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import fill

from rich.table import Table

from . import formatting
from .plan import Plan
from .ranking import BASELINE, Row, baseline, rank, untrained_metric
from .records import Record

WIDE = 100
"""Minimum terminal width for the full table."""


def table(plan: Plan, records: Sequence[Record], width: int = WIDE) -> Table:
    """Build a rich table of the ranking; its caption shows the untrained model's metric.

    Args:
        plan: The race's plan.
        records: The race's records.
        width: Width of the terminal. Below `WIDE` the table omits its less important columns.
    """
    metric = plan.request.metric
    better = "lower" if plan.request.lower_is_better else "higher"
    rows = rank(plan, records)
    scale = formatting.metric_scale(plan, records)
    wide = width >= WIDE
    caption = [f"untrained: {formatting.metric(untrained_metric(records), scale)}"]
    if any(row.edge is not None and row.trials > 1 for row in rows):
        caption.append(formatting.EDGE_LEGEND)
    if not wide:
        caption.append(f"more columns in the report, or in a terminal at least {WIDE} wide")
    drawn = Table(
        title=f"{plan.request.task}: {metric}, {better} is better",
        caption="\n".join(caption),
        title_justify="left",
        caption_justify="left",
    )
    columns: list[tuple[str, Callable[[Row], str], bool]] = [
        (fill(metric, 14), lambda row: formatting.final_metric(row, scale), True),
        ("tuned lr", formatting.tuned_lr_short, True),
        ("untuned,\nseed 0", lambda row: formatting.default_metric(row, scale), wide),
        (
            f"steps to\n{BASELINE}'s",
            lambda row: formatting.steps_to_target(row, plan.steps),
            BASELINE in plan.labels,
        ),
        ("state\nB/param", lambda row: f"{row.state_bytes_per_parameter:.2f}", True),
        ("step\nms", lambda row: f"{row.optimizer_ms:.2f}", True),
        (f"×\n{baseline(plan)}", lambda row: f"{row.step_ratio:.2f}", wide),
    ]
    shown = [(header, cell) for header, cell, fits in columns if fits]
    drawn.add_column("optimizer", style="bold", no_wrap=True)
    for header, _ in shown:
        drawn.add_column(header, justify="right")
    for row in rows:
        drawn.add_row(row.optimizer, *(cell(row) for _, cell in shown))
    return drawn
