"""The ranking's columns, as the page, the terminal and Markdown show them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..analysis.ranking import SIGNIFICANT, Estimate, Row
from .merge import Section

ARROWS = {"lowest": "↓", "highest": "↑"}
LEGEND = "=: cannot be told from the first row. ↑ ↓: the highest or lowest value tried; a better one may lie beyond."


@dataclass(frozen=True)
class Column:
    """A column of the ranking."""

    header: str
    help: str
    cells: list[str]
    keys: list[float]
    """What the column sorts by; NaN for empty cells."""
    rank: int
    """A narrow terminal drops the columns of the highest rank first."""


def number(value: float, digits: int = 3) -> str:
    """Format with significant digits, without an exponent where that stays short; an empty string for NaN.

    Example:
        >>> number(8.0), number(0.00412), number(1234.5), number(3e-05), number(float("nan"))
        ('8', '0.00412', '1,234', '3e-05', '')
    """
    if math.isnan(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def decimals(rows: Sequence[Row]) -> int:
    """Return the decimals for a column of metrics: as many as the smallest spread needs, between 2 and 5.

    A digit that a change of the seed would change says nothing.
    """
    spreads = [row.test.std for row in rows if row.test.std > 0]
    means = [abs(row.test.mean) for row in rows if not math.isnan(row.test.mean)]
    if not spreads:
        return 3 if max(means, default=0) < 10 else 2
    return min(5, max(2, -math.floor(math.log10(min(spreads)))))


def estimate(value: Estimate, places: int) -> str:
    """Format a mean ± standard deviation, and the seeds that diverged.

    Example:
        >>> estimate(Estimate((1.0,)), 2), estimate(Estimate((float("nan"), 1.0)), 1)
        ('1.00', '1.0 (1/2 diverged)')
    """
    if not value.values:
        return ""
    if not value.finite:
        return "diverged"
    text = f"{value.mean:.{places}f}" + (
        "" if math.isnan(value.std) else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{value.std:.{places}f}"
    )
    return text + (f" ({value.diverged}/{value.seeds} diverged)" if value.diverged else "")


def columns(section: Section) -> list[Column]:
    """Return the columns that have anything to show."""
    experiment, rows = section.experiment, section.rows
    metric, places = experiment.metric, decimals(rows)
    base = experiment.baseline
    total = max((row.cells for row in rows), default=0)
    made: list[Column] = []

    def add(
        rank: int, header: str, help: str, text: Callable[[Row], str], key: Callable[[Row], float]
    ) -> None:
        cells = [text(row) for row in rows]
        if any(cells):
            made.append(Column(header, help, cells, [key(row) for row in rows], rank))

    def final(row: Row) -> str:
        return estimate(row.test, places) + ("\N{NO-BREAK SPACE}=" if row.tie else "")

    def best(name: str) -> Callable[[Row], str]:
        return lambda row: (
            f"{row.best[name]:.3g}" + (f" {ARROWS[row.edges[name]]}" if name in row.edges else "")
            if name in row.best
            else ""
        )

    better = "lower" if metric.lower_is_better else "higher"
    unit = f" [{metric.unit}]" if metric.unit else ""
    add(
        0,
        f"test {metric.name}{unit}",
        f"Mean ± standard deviation over the final seeds; {better} is better. “=” marks a tie with the first row: "
        f"no difference at p < {SIGNIFICANT}.",
        final,
        lambda row: row.test.mean,
    )
    for other in experiment.metrics[1:]:
        name = other.name
        add(
            5,
            f"test {name}",
            f"Mean ± standard deviation over the final seeds; {'lower' if other.lower_is_better else 'higher'} is better.",
            lambda row, name=name: estimate(row.others[name], max(places, 4)),  # type: ignore[misc]
            lambda row, name=name: row.others[name].mean,  # type: ignore[misc]
        )
    add(
        3,
        "untuned",
        "The same with the optimizer's own defaults.",
        lambda row: estimate(row.untuned, places),
        lambda row: row.untuned.mean,
    )
    for name in dict.fromkeys(name for row in rows for name in row.best):
        add(
            1 if name == "lr" else 2,
            f"best {name.replace('_', ' ')}",
            "The search's choice. ↑ ↓: the highest or lowest value tried; a better one may lie beyond.",
            best(name),
            lambda row, name=name: row.best.get(name, math.nan),  # type: ignore[misc]
        )
    add(
        0,
        "state B/param",
        "Bytes of optimizer state per parameter, measured on its tensors after training.",
        lambda row: number(row.state_bytes),
        lambda row: row.state_bytes,
    )
    add(
        1,
        "step ms",
        "Median milliseconds of optimizer.step(); all optimizers took turns on one model.",
        lambda row: number(_ms(row)),
        _ms,
    )
    add(
        4,
        f"× {base}",
        f"Step time divided by {base}'s.",
        lambda row: "" if math.isnan(row.step_ratio) else f"{row.step_ratio:.2f}",
        lambda row: row.step_ratio,
    )
    add(
        2,
        f"steps to {base}'s",
        f"Steps after which the mean curve reaches {base}'s final value on validation data.",
        lambda row: (
            number(round(row.steps_to_target) if row.steps_to_target >= 0 else math.nan, 6)
            or "–" * bool(base)
        ),
        lambda row: row.steps_to_target,
    )
    add(
        1,
        f"seconds to {base}'s",
        "These steps × the timed milliseconds of a training step.",
        lambda row: number(row.seconds_to_target) or "–" * bool(base),
        lambda row: row.seconds_to_target,
    )
    add(
        6,
        "decayed there",
        f"Test {metric.name} if the schedule ends at that step. ✓: its validation mean reaches the target.",
        lambda row: (
            f"{estimate(row.decayed, places)} {'✓' if row.decayed_reaches else '✗'}"
            if row.decayed.values
            else ""
        ),
        lambda row: row.decayed.mean,
    )
    if experiment.kind != "race" and total > 2:
        add(
            3,
            "good region",
            "Settings of the search within 1 % of the best one, of all that were tried.",
            lambda row: f"{row.good_cells} of {row.cells} ({row.good_cells / max(1, row.cells):.0%})",
            lambda row: row.good_cells / max(1, row.cells),
        )
    return made


def verdict(section: Section) -> str:
    """Return the answer in a sentence or two."""
    experiment, rows, metric = section.experiment, section.rows, section.experiment.metric
    ranked = [row for row in rows if row.test.finite]
    if not ranked:
        return (
            "Nothing was trained."
            if not experiment.seeds or (not section.records and experiment.costs)
            else "No optimizer has a final result yet."
        )
    first, places = ranked[0], decimals(rows)
    tied = [row.optimizer for row in ranked[1:] if row.tie]
    text = f"{first.optimizer} has the best {metric.name} on test data, {estimate(first.test, places)}"
    if first.wins:
        text += ", and differs from all others."
    elif tied:
        text += f", but cannot be told from {', '.join(tied)}."
    else:
        text += "."
    small = min([first, *(row for row in ranked if row.tie)], key=lambda row: row.state_bytes)
    if small is not first and small.state_bytes < first.state_bytes:
        text += (
            f" Of these, {small.optimizer} keeps the least state: {number(small.state_bytes)} bytes per parameter "
            f"instead of {number(first.state_bytes)}."
        )
    return text


def _ms(row: Row) -> float:
    return math.nan if row.cost is None or row.cost.optimizer_ms is None else row.cost.optimizer_ms
