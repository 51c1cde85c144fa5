"""The plot of step time and state over model size."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..theme import LIGHT, SeriesStyle, Theme, series_style, style_axes
from .results import Record, Row

DPI = 150


def sizes(record: Record) -> list[Row]:
    """Return the rows to draw: the sweep's, or those of whole models if there was no sweep.

    Keeps one row per optimizer and model.
    """
    swept = [row for result in record.results if result.section == "sweep" for row in result.rows]
    whole = [
        row
        for result in record.results
        if result.section == "steps"
        for row in result.rows
        if row.get("scope") == "element"
    ]
    first = {(row["key"], row["model"]): row for row in reversed(swept or whole)}
    return [row for row in reversed(first.values()) if row["key"] != "axpy"]


def plot(record: Record, theme: Theme = LIGHT) -> Figure | None:
    """Draw both panels with a line per optimizer; return None if there is nothing to draw.

    Hollow marks are planned models: their state is counted on the meta device, and their step is not timed.
    """
    rows = sizes(record)
    lines = list(dict.fromkeys(row["key"] for row in rows if row["status"] in ("ok", "planned")))
    if not lines:
        return None
    figure = Figure(figsize=(10.4, 4.4), layout="constrained", facecolor=theme.background)
    time, memory = figure.subplots(1, 2)
    for axes, quantity in ((time, "step, ms"), (memory, "state, GiB")):
        style_axes(axes, theme, "parameters", quantity)
        axes.set_xscale("log")
    time.set_yscale("log")
    for index, key in enumerate(lines):
        own = sorted((row for row in rows if row["key"] == key), key=lambda row: row["parameters"])
        style, label = series_style(theme, index), _label(own[0])
        timed = [row for row in own if row.get("step_ms") is not None]
        _line(time, timed, [row["step_ms"] for row in timed], style, label, theme)
        with_state = [row for row in own if row.get("state_bytes") is not None]
        _line(memory, with_state, [row["state_bytes"] / 2**30 for row in with_state], style, label, theme)
    memory.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=theme.text, handlelength=2.6
    )
    memory.set_title("hollow: planned, not run", fontsize=9, loc="left", color=theme.muted)
    return figure


def _label(row: Row) -> str:
    package = "" if row["source"] == "steepest" else f"{row['source']} "
    return f"{package}{row['label']}, {row['how']}"


def _line(
    axes: Axes, rows: Sequence[Row], values: Sequence[float], style: SeriesStyle, label: str, theme: Theme
) -> None:
    counts = [row["parameters"] for row in rows]
    axes.plot(counts, values, linestyle=style.dashes, color=style.color, lw=1.6, label=label)
    for count, value, row in zip(counts, values, rows, strict=True):
        face = style.color if row["status"] == "ok" else theme.background
        axes.plot(count, value, style.marker, mfc=face, mec=style.color, ms=6)
