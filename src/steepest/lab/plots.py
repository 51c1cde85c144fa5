"""The plots of a race, drawn from its plan and records alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from . import formatting, search
from .plan import Plan
from .ranking import rank, tuned_trials, untrained_metric
from .records import Point, Record
from .theme import SeriesStyle, Theme, series_style, style_axes
from .trial_scheduler import lr_scores

DPI = 150

_INITIAL_FRACTION = 0.2
"""The first part of training, where all curves fall steeply; the y-axis need not show it entirely."""
_LOG_TIME_RATIO = 3
"""The time axis is logarithmic if the slowest optimizer takes this many times as long as the fastest."""
_LR_OFFSET = 0.025
"""Horizontal distance in decades between the optimizers' marks at the same lr in the plot of the search."""
_MAX_EXTENSION = 3
"""The y-axis includes the untrained level if that makes its range at most this many times as large."""


@dataclass(frozen=True)
class Plot:
    """A plot with its title and caption."""

    name: str
    title: str
    caption: str
    draw: Callable[[Plan, Sequence[Record], Theme], Figure]


def validation(plan: Plan, records: Sequence[Record], theme: Theme) -> Figure:
    """Plot the metric at each optimizer's tuned lr over steps and over seconds."""
    return _curves(
        plan, records, theme, plan.request.metric, lambda record: record.validation, evaluated=True
    )


def training(plan: Plan, records: Sequence[Record], theme: Theme) -> Figure:
    """Plot the training loss at each optimizer's tuned lr over steps and over seconds."""
    return _curves(plan, records, theme, "training loss", lambda record: record.curve, evaluated=False)


def lr_search(plan: Plan, records: Sequence[Record], theme: Theme) -> Figure:
    """Plot the metric over the learning rates tried, and crosses below for trials too bad to draw."""
    trials = [record for record in records if record.phase == "search"]
    fence = _search_fence(plan, records, trials)
    failed = [record for record in trials if not (record.finite and plan.score(record.metric) <= fence)]
    with_failures = [label for label in plan.labels if any(record.optimizer == label for record in failed)]
    strip = 0.35 + 0.2 * len(with_failures)
    figure = _figure(theme, 8.6, 4.4 + (strip if with_failures else 0.0))
    axes, *below = figure.subplots(
        2 if with_failures else 1,
        1,
        sharex=True,
        squeeze=False,
        height_ratios=(4.4, strip) if with_failures else (1,),
    )[:, 0]
    bottom = below[0] if below else axes
    style_axes(axes, theme, "", plan.request.metric)
    style_axes(bottom, theme, "learning rate", "" if below else plan.request.metric)
    axes.set_xscale("log")
    bottom.xaxis.set_minor_locator(LogLocator(subs=range(2, 10)))
    bottom.xaxis.set_minor_formatter(NullFormatter())
    shown = [record.metric for record in trials if record not in failed]
    _set_ylim(axes, shown, lower_is_better=plan.request.lower_is_better)
    for index, (label, style) in enumerate(_styles(plan, theme)):
        tried = sorted((r.lr, r.metric if r.finite else math.nan) for r in trials if r.optimizer == label)
        if not tried:
            continue
        lrs, metrics = np.array(tried).T
        best = lrs == search.best_lr(lr_scores(plan, records, label))
        # Several optimizers try the same decades; an offset keeps their marks from hiding each other.
        lrs = lrs * 10 ** (_LR_OFFSET * (index - (len(plan.labels) - 1) / 2))
        line: dict[str, Any] = {"color": style.color, "lw": 1.6, "ms": 4, "label": label}
        axes.plot(lrs, metrics, linestyle=style.dashes, marker=style.marker, **line)
        if best.any():
            # A larger mark with an edge, because a ring around the mark would hide its neighbours.
            large: dict[str, Any] = {"ms": 10, "color": style.color, "mec": theme.background, "mew": 1.2}
            axes.plot(lrs[best], metrics[best], style.marker, zorder=4, **large)
    for strip_axes in below:
        _draw_failures(strip_axes, failed, with_failures, dict(_styles(plan, theme)), theme)
    _untrained_line(axes, untrained_metric(records), theme, formatting.metric_scale(plan, records))
    _legend(axes, theme)
    return figure


def summary(plan: Plan, records: Sequence[Record], theme: Theme) -> Figure:
    """Plot final metric, state bytes per parameter and optimizer step time, best optimizer first."""
    rows = rank(plan, records)[::-1]
    positions = range(len(rows))
    figure = _figure(theme, 10.4, 1.2 + 0.42 * max(3, len(rows)))
    panels = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    metric, memory, time = panels
    style_axes(metric, theme, f"final {plan.request.metric}")
    style_axes(memory, theme, "state, bytes per parameter")
    style_axes(time, theme, "optimizer step, ms")
    styles = dict(_styles(plan, theme))
    colors = [styles[row.optimizer].color for row in rows]
    scale = formatting.metric_scale(plan, records)
    fence = _fence(plan, records, [plan.score(row.metric) for row in rows if not math.isnan(row.metric)])
    for y, row in zip(positions, rows, strict=True):
        style = styles[row.optimizer]
        std = 0.0 if math.isnan(row.std) else row.std
        text: dict[str, Any] = {"color": theme.text, "fontsize": 9, "va": "center"}
        result = formatting.final_metric(row, scale)
        if plan.score(row.metric) <= fence:
            dot: dict[str, Any] = {"color": style.color, "marker": style.marker, "ms": 8, "capsize": 4}
            metric.errorbar(row.metric, y, xerr=std, lw=1.8, **dot)
            above = {"xytext": (0, 10), "textcoords": "offset points", "ha": "center"}
            metric.annotate(result, (row.metric, y), **above, **text)
        else:
            metric.annotate(result, (0.5, y), xycoords=("axes fraction", "data"), ha="center", **text)
        beside = {"xytext": (5, 0), "textcoords": "offset points"}
        state = row.state_bytes_per_parameter
        memory.annotate(f"{state:.2f}", (state, y), **beside, **text)
        time.annotate(f"{row.optimizer_ms:.2f}", (row.optimizer_ms, y), **beside, **text)
    memory.barh(positions, [row.state_bytes_per_parameter for row in rows], color=colors, height=0.6)
    time.barh(positions, [row.optimizer_ms for row in rows], color=colors, height=0.6)
    for bars in (memory, time):
        bars.set_xlim(0, max(1e-9, bars.get_xlim()[1]) * 1.22)
    metric.margins(x=0.12)
    metric.set_ylim(-0.6, len(rows) - 0.3)
    metric.set_yticks(list(positions), [row.optimizer for row in rows])
    metric.tick_params(axis="y", labelcolor=theme.text, labelsize=10)
    for panel in panels:
        panel.grid(visible=False, axis="y")
    return figure


PLOTS = (
    Plot(
        "summary",
        "At a glance",
        "The optimizers, best first: the mean metric over the seeds ± one standard deviation, the state "
        "memory per parameter, and the time of one optimizer step.",
        summary,
    ),
    Plot(
        "validation",
        "The metric during training",
        "Each optimizer at its tuned learning rate: the mean over the seeds, with the range from minimum to "
        "maximum shaded. The y-axis covers the curves after the first fifth of the steps. Seconds are steps "
        "times the step time that was measured while all optimizers took turns.",
        validation,
    ),
    Plot(
        "training",
        "Training loss",
        "The same trials: the training loss, averaged over intervals of steps.",
        training,
    ),
    Plot(
        "search",
        "The learning-rate search",
        "Every learning rate tried, all with the same seed; the optimizers' marks are slightly offset. "
        "The larger mark is each optimizer's best. A cross below is a trial that diverged or whose metric is "
        "too far from the best to be drawn.",
        lr_search,
    ),
)


def _curves(
    plan: Plan,
    records: Sequence[Record],
    theme: Theme,
    quantity: str,
    points: Callable[[Record], list[Point]],
    *,
    evaluated: bool,
) -> Figure:
    figure = _figure(theme, 10.4, 4.4)
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    style_axes(by_step, theme, "step", quantity)
    style_axes(by_time, theme, "seconds")
    lower_is_better = plan.request.lower_is_better or not evaluated
    shown: list[float] = []
    starts: list[float] = []
    ends: list[float] = []
    # With many optimizers the shaded bands overlap, so make them more transparent.
    alpha = min(0.18, 0.7 / len(plan.labels))
    for label, style in _styles(plan, theme):
        finished = [points(r) for r in tuned_trials(plan, records, label) if r.finite]
        if not finished:
            continue
        steps = np.array([step for step, _, _ in finished[0]])
        values = np.array([[value for _, _, value in curve] for curve in finished])
        low, mean, high = values.min(0), values.mean(0), values.max(0)
        starts += [*values[:, 0]]
        late = steps >= _INITIAL_FRACTION * steps[-1]
        shown += [*low[late], *high[late]]
        seconds = steps * (plan.times.gradient_ms + plan.times.optimizer_ms[label]) / 1e3
        line = {"color": style.color, "linestyle": style.dashes, "lw": 1.6, "ms": 5, "label": label}
        ends.append(seconds[-1])
        for axes, x in ((by_step, steps), (by_time, seconds)):
            axes.fill_between(x, low, high, color=style.color, alpha=alpha, lw=0)
            axes.plot(x, mean, marker=style.marker if evaluated else "", **line)
    # The untrained model's training loss is unknown; the first point of a curve is close to it.
    level = untrained_metric(records) if evaluated else max(starts, default=math.nan)
    by_step.set_xlim(left=0)
    if ends and max(ends) > _LOG_TIME_RATIO * min(ends):
        # On a linear axis the fast optimizers' curves would be a few pixels wide. A logarithmic axis
        # starts after the first seconds, where every curve is still falling.
        by_time.set_xscale("log")
        by_time.set_xlim(_INITIAL_FRACTION / 2 * min(ends), 1.15 * max(ends))
    else:
        by_time.set_xlim(left=0)
    _set_ylim(by_step, _without_outliers(shown, lower_is_better), level, lower_is_better=lower_is_better)
    if evaluated:
        scale = formatting.metric_scale(plan, records)
        _untrained_line(by_step, level, theme, scale)
        _untrained_line(by_time, level, theme, scale, annotate=False)
    _legend(by_time, theme)
    return figure


def _fence(plan: Plan, records: Sequence[Record], scores: Sequence[float]) -> float:
    """Return the worst score to draw: neither worse than untrained nor an outlier."""
    level = plan.score(untrained_metric(records))
    return min(math.inf if math.isnan(level) else level, _outer_fence(scores))


def _outer_fence(scores: Sequence[float]) -> float:
    """Return Tukey's upper outer fence; scores beyond it are outliers."""
    if len(scores) < 2:
        return math.inf
    low, _, high = quantiles(scores, n=4, method="inclusive")
    return high + 3 * (high - low)


def _without_outliers(values: Sequence[float], lower_is_better: bool) -> list[float]:
    """Return the values whose scores are not outliers."""
    sign = 1 if lower_is_better else -1
    scores = [sign * value for value in values if math.isfinite(value)]
    fence = _outer_fence(scores)
    return [sign * score for score in scores if score <= fence]


def _search_fence(plan: Plan, records: Sequence[Record], trials: Sequence[Record]) -> float:
    """Return the worst score to draw in the search: also within a third of the way from best to untrained.

    The search spans decades, but the interesting trials are close to the best one.
    """
    scores = [plan.score(record.metric) for record in trials if record.finite]
    fence = _fence(plan, records, scores)
    level = plan.score(untrained_metric(records))
    if scores and math.isfinite(level):
        fence = min(fence, min(scores) + (level - min(scores)) / 3)
    # Draw the best trial even if it does not beat the untrained model.
    return max(fence, min(scores, default=fence))


def _set_ylim(axes: Axes, values: Sequence[float], level: float = math.nan, *, lower_is_better: bool) -> None:
    """Fit the y-axis to the values, and to the untrained level if that does not extend it too much."""
    finite = [value for value in values if math.isfinite(value)] or [level]
    if not math.isfinite(finite[0]):
        return
    best, worst = (min(finite), max(finite)) if lower_is_better else (max(finite), min(finite))
    if math.isfinite(level) and abs(level - best) <= _MAX_EXTENSION * abs(worst - best):
        worst = level
    extent = (worst - best) or (level - best)
    if extent and math.isfinite(extent):
        bottom, top = sorted((best - 0.05 * extent, worst + 0.08 * extent))
        axes.set_ylim(bottom, top)


def _untrained_line(axes: Axes, level: float, theme: Theme, scale: float, *, annotate: bool = True) -> None:
    """Draw the untrained level as a line; if it is out of range, annotate the nearer edge with it."""
    if not math.isfinite(level):
        return
    bottom, top = axes.get_ylim()
    if bottom <= level <= top:
        axes.axhline(level, color=theme.muted, lw=1.2, linestyle=(0, (1, 2)), label="untrained")
    elif annotate:
        above = level > top
        axes.annotate(
            f"{'↑' if above else '↓'} untrained: {formatting.metric(level, scale)}",
            (0.98, 0.97 if above else 0.03),
            xycoords="axes fraction",
            ha="right",
            va="top" if above else "bottom",
            color=theme.muted,
            fontsize=9,
            bbox={"facecolor": theme.background, "edgecolor": "none", "pad": 1.5},
            zorder=5,
        )


def _draw_failures(
    axes: Axes, failed: Sequence[Record], labels: Sequence[str], styles: dict[str, SeriesStyle], theme: Theme
) -> None:
    """Draw failed trials as crosses, a row per optimizer so that they do not hide each other."""
    for row, label in enumerate(labels):
        lrs = [record.lr for record in failed if record.optimizer == label]
        cross: dict[str, Any] = {"color": styles[label].color, "ms": 6, "mew": 1.8}
        axes.plot(lrs, [row] * len(lrs), "x", **cross)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.tick_params(axis="y", labelcolor=theme.text, length=0)
    axes.grid(visible=False, axis="y")


def _styles(plan: Plan, theme: Theme) -> Iterator[tuple[str, SeriesStyle]]:
    for index, label in enumerate(plan.labels):
        yield label, series_style(theme, index)


def _figure(theme: Theme, width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=DPI, facecolor=theme.background, layout="constrained")


def _legend(axes: Axes, theme: Theme) -> None:
    if not axes.get_legend_handles_labels()[1]:
        return
    axes.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=theme.text, handlelength=2.6
    )
