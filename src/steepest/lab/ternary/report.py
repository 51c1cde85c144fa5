"""The study's report: a Markdown table and a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .. import formatting
from ..ranking import tuned_trials
from ..theme import LIGHT, series_style, style_axes
from .methods import LABELS
from .study import Result
from .weight_stats import WeightStats

_DPI = 110


def table(results: Sequence[Result]) -> str:
    """Format a Markdown table for every race, best first: the metric ± one standard deviation over the seeds.

    "Flips" is the fraction of the hidden weights that a step changed: the mean over the training, and the
    last step.
    """
    parts = []
    for result in results:
        rows = result.race.rows
        scale = max(row.metric for row in rows if not math.isnan(row.metric))
        metric = result.race.plan.request.metric
        flips = "flips per step: mean → last"
        head = ["training of the hidden weights", metric, "B/weight", "lr", flips, "zeros"]
        lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
        for row in rows:
            stats = result.tuned_stats(row.optimizer)
            cells = [
                LABELS[row.optimizer],
                formatting.final_metric(row, scale),
                f"{result.bytes_per_weight(row.optimizer):.2f}" if stats else "",
                "" if row.lr is None else f"{row.lr:g}",
                *_flips_and_zeros(stats),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append(f"**{result.name}**, {result.race.plan.steps} steps\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _flips_and_zeros(stats: Sequence[WeightStats]) -> tuple[str, str]:
    flips = np.array([each.flips for each in stats])
    zeros = np.array([each.zeros for each in stats])
    if flips.size == 0 or np.isnan(flips).any():
        return "", ""
    mean, last = flips.mean(), flips[:, -1].mean()
    return f"{_percent(mean)} → {_percent(last)}", f"{zeros[:, -1].mean():.0%}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %" if fraction else "0"


def draw(results: Sequence[Result]) -> Figure:
    """Draw a row of panels for every race: metric, fraction of flipped weights, fraction of zeros."""
    theme = LIGHT
    size = (12.5, 3.3 * len(results))
    figure = Figure(figsize=size, dpi=_DPI, facecolor=theme.background, layout="constrained")
    panels = figure.subplots(len(results), 3, squeeze=False)
    for row, result in zip(panels, results, strict=True):
        plan, records = result.race.plan, result.race.records
        metric, flips, zeros = row
        titles = (
            f"{result.name}: {plan.request.metric}",
            "fraction of the weights flipped in a step",
            "fraction of the weights that are 0",
        )
        for axes, title in zip(row, titles, strict=True):
            style_axes(axes, theme, "step")
            axes.set_title(title, color=theme.text, fontsize=10, loc="left")
        ends = []
        for index, label in enumerate(plan.labels):
            style = series_style(theme, index)
            line: dict[str, Any] = {
                "color": style.color,
                "ls": style.dashes,
                "lw": 1.6,
                "label": LABELS[label],
            }
            trained = [r for r in tuned_trials(plan, records, label) if r.finite]
            if trained:
                steps = np.array([step for step, _, _ in trained[0].validation])
                values = np.array([[value for _, _, value in r.validation] for r in trained])
                metric.fill_between(steps, values.min(0), values.max(0), color=style.color, alpha=0.1, lw=0)
                metric.plot(steps, values.mean(0), marker=style.marker, ms=4, **line)
                ends += [*values[:, steps >= 0.3 * steps[-1]].ravel()]
            stats = result.tuned_stats(label)
            if stats and not np.isnan(stats[0].zeros).any():
                at = stats[0].steps
                flips.plot(at, np.array([each.flips for each in stats]).mean(0), marker="", **line)
                zeros.plot(at, np.array([each.zeros for each in stats]).mean(0), marker="", **line)
        flips.set_yscale("symlog", linthresh=1e-5)
        flips.set_ylim(bottom=0)
        if ends:
            margin = 0.08 * max(max(ends) - min(ends), 1e-9)
            metric.set_ylim(min(ends) - margin, max(ends) + margin)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, labelcolor=theme.text
    )
    return figure


def write(out: Path, results: Sequence[Result]) -> Path:
    """Write ``ternary.md`` and ``ternary.png`` into the directory; return the path of the first."""
    draw(results).savefig(out / "ternary.png")
    page = out / "ternary.md"
    page.write_text(f"{table(results)}\n![The curves](ternary.png)\n", encoding="utf-8")
    return page
