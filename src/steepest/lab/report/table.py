"""The ranking's columns, as the page, the terminal and Markdown show them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..analysis.ranking import Estimate
from ..analysis.welch import SIGNIFICANT
from ..records import Metric
from .merge import Section

ARROWS = {"lowest": "↓", "highest": "↑"}
LEGEND = (
    "=: not significantly worse than the first row. ↑ ↓: the highest or lowest value tried; a better one may "
    "lie beyond it."
)
_SPACE = "\N{NO-BREAK SPACE}"


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


def decimals(estimates: Sequence[Estimate]) -> int:
    """Return the decimals for a column of metrics: as many as the smallest spread needs, between 2 and 5.

    A digit that a change of the seed would change says nothing.
    """
    spreads = [each.std for each in estimates if each.std > 0]
    means = [abs(each.mean) for each in estimates if each.finite]
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
        "" if math.isnan(value.std) else f"{_SPACE}±{_SPACE}{value.std:.{places}f}"
    )
    return text + (f" ({value.diverged}/{value.seeds} diverged)" if value.diverged else "")


def columns(section: Section) -> list[Column]:
    """Return the columns that have anything to show."""
    experiment, rows = section.experiment, section.rows
    metric, base = experiment.metric, experiment.baseline
    places = decimals([row.test for row in rows])
    made: list[Column] = []

    def add(rank: int, header: str, help: str, keys: Sequence[float], cells: Sequence[str] = ()) -> None:
        cells = cells or [number(key) for key in keys]
        if any(cells):
            made.append(Column(header, help, [*cells], [*keys], rank))

    def better(metric: Metric) -> str:
        direction = "lower" if metric.lower_is_better else "higher"
        return f"Mean ± standard deviation over the final seeds; {direction} is better."

    unit, tie = f" [{metric.unit}]" if metric.unit else "", f"{_SPACE}="
    help = f"{better(metric)} “=”: no significant difference from the first row (p ≥ {SIGNIFICANT})."
    cells = [estimate(row.test, places) + tie * row.tie for row in rows]
    add(0, f"test {metric.name}{unit}", help, [row.test.mean for row in rows], cells)
    for other in experiment.metrics[1:]:
        values = [row.others[other.name] for row in rows]
        cells = [estimate(value, decimals(values)) for value in values]
        add(5, f"test {other.name}", better(other), [value.mean for value in values], cells)
    help = "The same metric with the optimizer's defaults."
    own = decimals([row.untuned for row in rows])
    cells = [estimate(row.untuned, own) for row in rows]
    add(3, "untuned", help, [row.untuned.mean for row in rows], cells)
    for name in dict.fromkeys(name for row in rows for name in row.best):
        keys = [row.best.get(name, math.nan) for row in rows]
        arrows = [_SPACE + ARROWS[row.edges[name]] if name in row.edges else "" for row in rows]
        cells = [number(key) + arrow for key, arrow in zip(keys, arrows, strict=True)]
        help = (
            "What the search chose. ↑ ↓: the highest or lowest value tried; a better one may lie beyond it."
        )
        add(1 if name == "lr" else 2, f"best {name.replace('_', ' ')}", help, keys, cells)
    help = "Bytes of optimizer state per parameter, counted in its tensors after training."
    add(0, "state B/param", help, [row.state_bytes for row in rows])
    help = "Median milliseconds of optimizer.step(), with all optimizers taking turns on one model."
    add(1, "step ms", help, [(row.cost and row.cost.optimizer_ms) or math.nan for row in rows])
    keys = [row.step_ratio for row in rows]
    cells = ["" if math.isnan(key) else f"{key:.2f}" for key in keys]
    add(4, f"× {base}", f"Step time divided by {base}'s.", keys, cells)
    none = "–" if base else ""
    keys = [row.steps_to_target for row in rows]
    cells = [none if math.isnan(key) else f"{key:,.0f}" for key in keys]
    help = f"Steps after which the mean curve reaches {base}'s final value on validation data."
    add(2, f"steps to match {base}", help, keys, cells)
    keys = [row.seconds_to_target for row in rows]
    help = "That number of steps × the measured time of a training step."
    add(1, f"seconds to match {base}", help, keys, [number(key) or none for key in keys])
    marks = [f" {'✓' if row.decayed_reaches else '✗'}" if row.decayed.values else "" for row in rows]
    cells = [estimate(row.decayed, places) + mark for row, mark in zip(rows, marks, strict=True)]
    help = (
        f"Test {metric.name} of a rerun whose schedule ends there. ✓: it matches {base} on validation data."
    )
    add(6, "rerun to that step", help, [row.decayed.mean for row in rows], cells)
    if experiment.kind != "race" and max((row.cells for row in rows), default=0) > 2:
        keys = [row.good_cells / max(1, row.cells) for row in rows]
        cells = [f"{row.good_cells} of {row.cells} ({key:.0%})" for row, key in zip(rows, keys, strict=True)]
        add(3, "good region", "How many of the settings tried come within 1 % of the best.", keys, cells)
    return made


def verdict(section: Section) -> str:
    """Return the answer in a sentence or two."""
    experiment, rows = section.experiment, section.rows
    ranked = [row for row in rows if row.test.finite]
    if not ranked:
        measured = not section.records and experiment.costs
        return "Only steps were measured." if measured else "No optimizer has a final result yet."
    first, places = ranked[0], decimals([row.test for row in rows])
    tied = [row.optimizer for row in ranked[1:] if row.tie]
    best = f"the best {experiment.metric.name} on test data"
    others = f", but is not significantly better than {' or '.join(tied)}" if tied else ""
    others = ", significantly better than every other" if first.wins else others
    others = " with the only seed" if len(experiment.seeds) == 1 else others
    text = f"{first.optimizer} has {best}, {estimate(first.test, places)}{others}."
    # A mean so noisy that its difference from the first is not significant need not be as good.
    near = [row for row in ranked if row.tie and abs(row.test.mean - first.test.mean) <= 2 * first.test.std]
    small = min([first, *near], key=lambda row: row.state_bytes)
    if small.state_bytes < first.state_bytes:
        text += f" Of these, {small.optimizer} keeps the least state: {number(small.state_bytes)} bytes per "
        text += f"parameter instead of {number(first.state_bytes)}."
    return text
