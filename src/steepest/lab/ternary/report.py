"""What the study shows: a table in Markdown, and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import wording
from ..standings import winners
from ..theme import LIGHT, mark
from .methods import LABELS
from .study import Result

_DPI = 110


def table(results: Sequence[Result]) -> str:
    """A Markdown table for every race, best first: the metric ± one standard deviation over the seeds.

    Flips are the part of the hidden weights that a step moved, on average over the training and in its last
    step.
    """
    parts = []
    for result in results:
        rows = result.race.rows
        like = max(row.metric for row in rows if not math.isnan(row.metric))
        unit = result.race.plan.request.metric
        head = [
            "training of the hidden weights",
            unit,
            "B/weight",
            "lr",
            "flips a step: mean → last",
            "zeros",
        ]
        lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
        for row in rows:
            seen = result.of(row.optimizer)
            cells = [
                LABELS[row.optimizer],
                wording.result(row, like),
                f"{result.bytes_per_weight(row.optimizer):.2f}" if seen else "",
                "" if row.lr is None else f"{row.lr:g}",
                *_movement(seen),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append(f"**{result.name}**, {result.race.plan.steps} steps\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _movement(seen: Sequence[Any]) -> tuple[str, str]:
    flips = np.array([watch.flips for watch in seen])
    zeros = np.array([watch.zeros for watch in seen])
    if flips.size == 0 or np.isnan(flips).any():
        return "", ""
    mean, last = flips.mean(), flips[:, -1].mean()
    return f"{_percent(mean)} → {_percent(last)}", f"{zeros[:, -1].mean():.0%}"


def _percent(part: float) -> str:
    return f"{100 * part:.2g} %" if part else "0"


def draw(results: Sequence[Result]) -> Figure:
    """A row of panels for every race: the metric, the part of the weights that a step flips, the zeros."""
    theme = LIGHT
    size = (12.5, 3.3 * len(results))
    figure = Figure(figsize=size, dpi=_DPI, facecolor=theme.ground, layout="constrained")
    panels = figure.subplots(len(results), 3, squeeze=False)
    for row, result in zip(panels, results, strict=True):
        plan, records = result.race.plan, result.race.records
        metric, flips, zeros = row
        _dress(metric, f"{result.name}: {plan.request.metric}")
        _dress(flips, "part of the weights flipped in a step")
        _dress(zeros, "part of the weights that is 0")
        ends = []
        for index, label in enumerate(plan.labels):
            style = mark(theme, index)
            line: dict[str, Any] = {
                "color": style.color,
                "ls": style.dashes,
                "lw": 1.6,
                "label": LABELS[label],
            }
            trained = [r for r in winners(plan, records, label) if r.finite]
            if trained:
                steps = np.array([step for step, _, _ in trained[0].validation])
                values = np.array([[value for _, _, value in r.validation] for r in trained])
                metric.fill_between(steps, values.min(0), values.max(0), color=style.color, alpha=0.1, lw=0)
                metric.plot(steps, values.mean(0), marker=style.marker, ms=4, **line)
                ends += [*values[:, steps >= 0.3 * steps[-1]].ravel()]
            seen = result.of(label)
            if seen and not np.isnan(seen[0].zeros).any():
                at = seen[0].steps
                flips.plot(at, np.array([w.flips for w in seen]).mean(0), marker="", **line)
                zeros.plot(at, np.array([w.zeros for w in seen]).mean(0), marker="", **line)
        flips.set_yscale("symlog", linthresh=1e-5)
        flips.set_ylim(bottom=0)
        if ends:
            room = max(max(ends) - min(ends), 1e-9)
            metric.set_ylim(min(ends) - 0.08 * room, max(ends) + 0.08 * room)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, labelcolor=theme.ink
    )
    return figure


def _dress(axes: Axes, title: str) -> None:
    theme = LIGHT
    axes.set_facecolor(theme.ground)
    axes.set_title(title, color=theme.ink, fontsize=10, loc="left")
    axes.set_xlabel("step", color=theme.ink)
    axes.tick_params(which="both", colors=theme.faint, length=3)
    axes.grid(color=theme.grid, lw=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)


def write(out: Path, results: Sequence[Result]) -> Path:
    """Write ``ternary.md`` and ``ternary.png`` into the folder; the path of the first."""
    draw(results).savefig(out / "ternary.png")
    page = out / "ternary.md"
    page.write_text(f"{table(results)}\n![The curves](ternary.png)\n", encoding="utf-8")
    return page
