"""The race's pictures, drawn from plan and records alone."""

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

from . import search, wording
from .course import tried
from .plan import Plan
from .records import Point, Record
from .standings import standings, untrained, winners
from .theme import Mark, Theme, mark

DPI = 150


@dataclass(frozen=True)
class Picture:
    """A picture and what to say under it."""

    name: str
    title: str
    caption: str
    draw: Callable[[Plan, Sequence[Record], Theme], Figure]


def validation(plan: Plan, records: Sequence[Record], theme: Theme) -> Figure:
    """The metric during training at each optimizer's tuned lr, against steps and against seconds."""
    return _curves(plan, records, theme, plan.request.metric, lambda record: record.validation, judged=True)


def training(plan: Plan, records: Sequence[Record], theme: Theme) -> Figure:
    """The training loss at each optimizer's tuned lr, against steps and against seconds."""
    return _curves(plan, records, theme, "training loss", lambda record: record.curve, judged=False)


def lr_search(plan: Plan, records: Sequence[Record], theme: Theme) -> Figure:
    """The metric of every learning rate tried, a line per optimizer; failed trials at the worst edge."""
    figure = _figure(theme, 8.6, 4.4)
    axes = figure.subplots()
    _dress(axes, theme, "learning rate", plan.request.metric)
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(LogLocator(subs=range(2, 10)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    trials = [record for record in records if record.phase == "search"]
    scores = [plan.score(record.metric) for record in trials if record.finite]
    fence = _fence(plan, records, scores)
    shown = [r.metric for r in trials if r.finite and plan.score(r.metric) <= fence]
    _limit(axes, shown, math.nan, lower_is_better=plan.request.lower_is_better)
    worst = axes.get_ylim()[1 if plan.request.lower_is_better else 0]
    for label, style in _marks(plan, theme):
        attempts = sorted((r.lr, r.metric if r.finite else math.nan) for r in trials if r.optimizer == label)
        if not attempts:
            continue
        lrs, metrics = np.array(attempts).T
        line: dict[str, Any] = {"color": style.color, "lw": 1.6, "ms": 5, "label": label}
        axes.plot(lrs, metrics, linestyle=style.dashes, marker=style.marker, **line)
        lost = [r.lr for r in trials if r.optimizer == label and r.metric not in shown]
        if lost:
            cross: dict[str, Any] = {"color": style.color, "ms": 9, "mew": 2.2, "clip_on": False}
            axes.plot(lost, [worst] * len(lost), "x", **cross)
        best = lrs == search.best_lr(tried(plan, records, label))
        if best.any():
            ring: dict[str, Any] = {"ms": 13, "mfc": "none", "mec": style.color, "mew": 1.8, "zorder": 4}
            axes.plot(lrs[best], metrics[best], "o", **ring)
    _legend(axes, theme)
    return figure


def summary(plan: Plan, records: Sequence[Record], theme: Theme) -> Figure:
    """Final metric, state bytes per parameter and optimizer step time, a line per optimizer, best first."""
    rows = standings(plan, records)[::-1]
    places = range(len(rows))
    figure = _figure(theme, 10.4, 1.2 + 0.42 * max(3, len(rows)))
    panels = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    metric, memory, time = panels
    _dress(metric, theme, f"final {plan.request.metric}", "")
    _dress(memory, theme, "state, bytes per parameter", "")
    _dress(time, theme, "optimizer step, ms", "")
    styles = dict(_marks(plan, theme))
    colors = [styles[row.optimizer].color for row in rows]
    fence = _fence(plan, records, [plan.score(row.metric) for row in rows if not math.isnan(row.metric)])
    for place, row in zip(places, rows, strict=True):
        style = styles[row.optimizer]
        spread = 0.0 if math.isnan(row.spread) else row.spread
        text: dict[str, Any] = {"color": theme.ink, "fontsize": 9, "va": "center"}
        outcome = wording.result(row)
        if plan.score(row.metric) <= fence:
            dot: dict[str, Any] = {"color": style.color, "marker": style.marker, "ms": 8, "capsize": 4}
            metric.errorbar(row.metric, place, xerr=spread, lw=1.8, **dot)
            above = {"xytext": (0, 10), "textcoords": "offset points", "ha": "center"}
            metric.annotate(outcome, (row.metric, place), **above, **text)
        else:
            metric.annotate(outcome, (0.5, place), xycoords=("axes fraction", "data"), ha="center", **text)
        beside = {"xytext": (5, 0), "textcoords": "offset points"}
        memory.annotate(
            f"{row.state_bytes_per_parameter:.2f}", (row.state_bytes_per_parameter, place), **beside, **text
        )
        time.annotate(f"{row.optimizer_ms:.2f}", (row.optimizer_ms, place), **beside, **text)
    memory.barh(places, [row.state_bytes_per_parameter for row in rows], color=colors, height=0.6)
    time.barh(places, [row.optimizer_ms for row in rows], color=colors, height=0.6)
    for bars in (memory, time):
        bars.set_xlim(0, max(1e-9, bars.get_xlim()[1]) * 1.22)
    metric.margins(x=0.12)
    metric.set_ylim(-0.6, len(rows) - 0.3)
    metric.set_yticks(list(places), [row.optimizer for row in rows])
    metric.tick_params(axis="y", labelcolor=theme.ink, labelsize=10)
    for panel in panels:
        panel.grid(visible=False, axis="y")
    return figure


PICTURES = (
    Picture(
        "summary",
        "At a glance",
        "Best first: the mean over the seeds and ± one standard deviation; the memory each holds per "
        "parameter; and the time of one optimizer step.",
        summary,
    ),
    Picture(
        "validation",
        "The metric while training",
        "Each optimizer at its tuned learning rate: the mean over the seeds, and from the least to the "
        "greatest of them shaded. Seconds are steps times the step time measured with all optimizers "
        "taking turns.",
        validation,
    ),
    Picture(
        "training",
        "Training loss",
        "The same trials: the loss of the batches trained on, averaged over stretches of steps.",
        training,
    ),
    Picture(
        "search",
        "The learning-rate search",
        "Every learning rate tried, all with the same seed. A ring marks each optimizer's best; a cross at "
        "the edge is a trial that diverged or ended too far from the others to be drawn.",
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
    judged: bool,
) -> Figure:
    figure = _figure(theme, 10.4, 4.4)
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    _dress(by_step, theme, "step", quantity)
    _dress(by_time, theme, "seconds", "")
    shown: list[float] = []
    starts: list[float] = []
    for label, style in _marks(plan, theme):
        finished = [points(r) for r in winners(plan, records, label) if r.finite]
        if not finished:
            continue
        steps = np.array([step for step, _, _ in finished[0]])
        values = np.array([[value for _, _, value in curve] for curve in finished])
        low, mean, high = values.min(0), values.mean(0), values.max(0)
        shown += [*low, *high]
        starts += [*values[:, 0]]
        seconds = steps * (plan.times.gradient_ms + plan.times.optimizer_ms[label]) / 1e3
        line = {"color": style.color, "linestyle": style.dashes, "lw": 1.6, "ms": 5, "label": label}
        for axes, x in ((by_step, steps), (by_time, seconds)):
            axes.fill_between(x, low, high, color=style.color, alpha=0.18, lw=0)
            axes.plot(x, mean, marker=style.marker if judged else "", **line)
    # Of the training loss the level is not known; its first stretch of steps is nearly untrained.
    level = untrained(records) if judged else max(starts, default=math.nan)
    for axes in (by_step, by_time):
        axes.set_xlim(left=0)
        if judged:
            _untrained_line(axes, level, theme)
    _limit(by_step, shown, level, lower_is_better=plan.request.lower_is_better or not judged)
    _legend(by_time, theme)
    return figure


def _fence(plan: Plan, records: Sequence[Record], scores: Sequence[float]) -> float:
    """The worst score worth drawing: not worse than untrained, and not so far out as to squash the rest."""
    level = plan.score(untrained(records))
    fence = math.inf if math.isnan(level) else level
    if len(scores) > 1:
        # Tukey's outer fence.
        low, _, high = quantiles(scores, n=4, method="inclusive")
        fence = min(fence, high + 3 * (high - low))
    return fence


def _limit(axes: Axes, values: Sequence[float], level: float, *, lower_is_better: bool) -> None:
    """Show from the best value to a little beyond the untrained level; what is worse leaves the picture."""
    known = [value for value in [*values, level] if math.isfinite(value)]
    if not known:
        return
    best, worst = (min(known), max(known)) if lower_is_better else (max(known), min(known))
    if math.isfinite(level):
        worst = level
    room = worst - best
    if room:
        bottom, top = sorted((best - 0.05 * room, worst + 0.08 * room))
        axes.set_ylim(bottom, top)


def _untrained_line(axes: Axes, level: float, theme: Theme) -> None:
    if math.isfinite(level):
        axes.axhline(level, color=theme.faint, lw=1.2, linestyle=(0, (1, 2)), label="untrained")


def _marks(plan: Plan, theme: Theme) -> Iterator[tuple[str, Mark]]:
    for index, label in enumerate(plan.labels):
        yield label, mark(theme, index)


def _figure(theme: Theme, width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=DPI, facecolor=theme.ground, layout="constrained")


def _dress(axes: Axes, theme: Theme, x: str, y: str) -> None:
    axes.set_facecolor(theme.ground)
    axes.set_xlabel(x, color=theme.ink)
    axes.set_ylabel(y, color=theme.ink)
    axes.tick_params(which="both", colors=theme.faint, length=3)
    axes.grid(color=theme.grid, lw=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)


def _legend(axes: Axes, theme: Theme) -> None:
    if not axes.get_legend_handles_labels()[1]:
        return
    axes.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=theme.ink, handlelength=2.6
    )
