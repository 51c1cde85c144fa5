"""Step time and state against model size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..theme import LIGHT, Mark, Theme, mark
from .results import Record, Row

DPI = 150


def sizes(record: Record) -> list[Row]:
    """The rows that the picture is drawn from: the sweep's, those of whole models if there was none.

    Rows of the same optimizer on the same model are drawn once.
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


def picture(record: Record, theme: Theme = LIGHT) -> Figure | None:
    """Both panels, a line per optimizer; None if nothing has a size to be drawn at.

    Hollow marks are planned: their state is counted on the meta device and their step was not taken.
    """
    rows = sizes(record)
    lines = list(dict.fromkeys(row["key"] for row in rows if row["status"] in ("ok", "planned")))
    if not lines:
        return None
    colors: Any = {
        "figure.facecolor": theme.ground,
        "axes.facecolor": theme.ground,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "grid.color": theme.grid,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
    }
    with rc_context(colors):
        figure = Figure(figsize=(10.4, 4.4), layout="constrained")
        time, memory = figure.subplots(1, 2)
        for axes, quantity in ((time, "step, ms"), (memory, "state, GiB")):
            axes.set_xlabel("parameters")
            axes.set_ylabel(quantity)
            axes.set_xscale("log")
        time.set_yscale("log")
        for index, key in enumerate(lines):
            own = sorted((row for row in rows if row["key"] == key), key=lambda row: row["parameters"])
            style, label = mark(theme, index), _label(own[0])
            timed = [row for row in own if row.get("step_ms") is not None]
            _line(time, timed, [row["step_ms"] for row in timed], style, label, theme)
            kept = [row for row in own if row.get("state_bytes") is not None]
            _line(memory, kept, [row["state_bytes"] / 2**30 for row in kept], style, label, theme)
        memory.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handlelength=2.6)
        memory.set_title("hollow: planned, not run", fontsize=9, loc="left", color=theme.faint)
    return figure


def _label(row: Row) -> str:
    whose = "" if row["source"] == "steepest" else f"{row['source']} "
    return f"{whose}{row['label']}, {row['how']}"


def _line(
    axes: Axes, rows: Sequence[Row], values: Sequence[float], style: Mark, label: str, theme: Theme
) -> None:
    counts = [row["parameters"] for row in rows]
    axes.plot(counts, values, linestyle=style.dashes, color=style.color, lw=1.6, label=label)
    for count, value, row in zip(counts, values, rows, strict=True):
        face = style.color if row["status"] == "ok" else theme.ground
        axes.plot(count, value, style.marker, mfc=face, mec=style.color, ms=6)
