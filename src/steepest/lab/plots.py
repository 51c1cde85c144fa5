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

_SETTLED = 0.2
"""The part of training whose curves need not be seen whole: there everything falls from untrained."""
_MANY_TIMES = 3
"""Seconds get a logarithmic axis if the slowest optimizer takes so many times the quickest's."""
_ASIDE = 0.025
"""Decades between optimizers at one lr, in the picture of the search."""
_LEVEL_ROOM = 3
"""The untrained level is drawn if the picture need not be more than so many times as tall for it."""


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
    """The metric of every learning rate tried, a line per optimizer; below it a cross for each lost trial."""
    trials = [record for record in records if record.phase == "search"]
    fence = _search_fence(plan, records, trials)
    lost = [record for record in trials if not (record.finite and plan.score(record.metric) <= fence)]
    losers = [label for label in plan.labels if any(record.optimizer == label for record in lost)]
    strip = 0.35 + 0.2 * len(losers)
    figure = _figure(theme, 8.6, 4.4 + (strip if losers else 0.0))
    axes, *below = figure.subplots(
        1 + bool(losers), 1, sharex=True, squeeze=False, height_ratios=(4.4, strip) if losers else (1,)
    )[:, 0]
    bottom = below[0] if below else axes
    _dress(axes, theme, "", plan.request.metric)
    _dress(bottom, theme, "learning rate", "" if below else plan.request.metric)
    axes.set_xscale("log")
    bottom.xaxis.set_minor_locator(LogLocator(subs=range(2, 10)))
    bottom.xaxis.set_minor_formatter(NullFormatter())
    shown = [record.metric for record in trials if record not in lost]
    _limit(axes, shown, lower_is_better=plan.request.lower_is_better)
    for index, (label, style) in enumerate(_marks(plan, theme)):
        attempts = sorted((r.lr, r.metric if r.finite else math.nan) for r in trials if r.optimizer == label)
        if not attempts:
            continue
        lrs, metrics = np.array(attempts).T
        best = lrs == search.best_lr(tried(plan, records, label))
        # Neighbours try the same decades: a little to the side, they do not hide each other.
        lrs = lrs * 10 ** (_ASIDE * (index - (len(plan.labels) - 1) / 2))
        line: dict[str, Any] = {"color": style.color, "lw": 1.6, "ms": 4, "label": label}
        axes.plot(lrs, metrics, linestyle=style.dashes, marker=style.marker, **line)
        if best.any():
            # Larger and edged, not ringed: a ring would hide its neighbours.
            large: dict[str, Any] = {"ms": 10, "color": style.color, "mec": theme.ground, "mew": 1.2}
            axes.plot(lrs[best], metrics[best], style.marker, zorder=4, **large)
    for strip_axes in below:
        _crosses(strip_axes, lost, losers, dict(_marks(plan, theme)), theme)
    _untrained_line(axes, untrained(records), theme, wording.scale(plan, records))
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
    like = wording.scale(plan, records)
    fence = _fence(plan, records, [plan.score(row.metric) for row in rows if not math.isnan(row.metric)])
    for place, row in zip(places, rows, strict=True):
        style = styles[row.optimizer]
        spread = 0.0 if math.isnan(row.spread) else row.spread
        text: dict[str, Any] = {"color": theme.ink, "fontsize": 9, "va": "center"}
        outcome = wording.result(row, like)
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
        "greatest of them shaded. The axis shows what follows the first fifth of the steps. Seconds are "
        "steps times the step time measured with all optimizers taking turns.",
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
        "Every learning rate tried, all with the same seed; the optimizers' marks are set a little apart. "
        "The larger mark is each optimizer's best; a cross below is a trial that diverged or ended too far "
        "from the best to be drawn.",
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
    lower_is_better = plan.request.lower_is_better or not judged
    shown: list[float] = []
    starts: list[float] = []
    ends: list[float] = []
    # Many bands over each other would be a fog.
    shade = min(0.18, 0.7 / len(plan.labels))
    for label, style in _marks(plan, theme):
        finished = [points(r) for r in winners(plan, records, label) if r.finite]
        if not finished:
            continue
        steps = np.array([step for step, _, _ in finished[0]])
        values = np.array([[value for _, _, value in curve] for curve in finished])
        low, mean, high = values.min(0), values.mean(0), values.max(0)
        starts += [*values[:, 0]]
        settled = steps >= _SETTLED * steps[-1]
        shown += [*low[settled], *high[settled]]
        seconds = steps * (plan.times.gradient_ms + plan.times.optimizer_ms[label]) / 1e3
        line = {"color": style.color, "linestyle": style.dashes, "lw": 1.6, "ms": 5, "label": label}
        ends.append(seconds[-1])
        for axes, x in ((by_step, steps), (by_time, seconds)):
            axes.fill_between(x, low, high, color=style.color, alpha=shade, lw=0)
            axes.plot(x, mean, marker=style.marker if judged else "", **line)
    # Of the training loss the level is not known; its first stretch of steps is nearly untrained.
    level = untrained(records) if judged else max(starts, default=math.nan)
    by_step.set_xlim(left=0)
    if ends and max(ends) > _MANY_TIMES * min(ends):
        # On a linear axis the quick ones would share its first pixels. Zero leaves the picture, and what
        # lies so early that every curve is still falling.
        by_time.set_xscale("log")
        by_time.set_xlim(_SETTLED / 2 * min(ends), 1.15 * max(ends))
    else:
        by_time.set_xlim(left=0)
    _limit(by_step, _without_strays(shown, lower_is_better), level, lower_is_better=lower_is_better)
    if judged:
        like = wording.scale(plan, records)
        _untrained_line(by_step, level, theme, like)
        _untrained_line(by_time, level, theme, like, told=False)
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


def _without_strays(values: Sequence[float], lower_is_better: bool) -> list[float]:
    """The values but those that lie so far out as to squash the rest."""
    scores = sorted(value if lower_is_better else -value for value in values if math.isfinite(value))
    if len(scores) > 1:
        low, _, high = quantiles(scores, n=4, method="inclusive")
        scores = [score for score in scores if score <= high + 3 * (high - low)]
    return scores if lower_is_better else [-score for score in scores]


def _search_fence(plan: Plan, records: Sequence[Record], trials: Sequence[Record]) -> float:
    """As `_fence`, and no further than a third of the way from the best to untrained.

    The search spans decades: the trials that decide lie close together at its best end.
    """
    scores = [plan.score(record.metric) for record in trials if record.finite]
    fence = _fence(plan, records, scores)
    level = plan.score(untrained(records))
    if scores and math.isfinite(level):
        fence = min(fence, min(scores) + (level - min(scores)) / 3)
    # The best is drawn even where nothing beats the untrained model.
    return max(fence, min(scores, default=fence))


def _limit(axes: Axes, values: Sequence[float], level: float = math.nan, *, lower_is_better: bool) -> None:
    """Show the values, and the level too where that costs them little; what is worse leaves the picture."""
    known = [value for value in values if math.isfinite(value)] or [level]
    if not math.isfinite(known[0]):
        return
    best, worst = (min(known), max(known)) if lower_is_better else (max(known), min(known))
    if math.isfinite(level) and abs(level - best) <= _LEVEL_ROOM * abs(worst - best):
        worst = level
    room = (worst - best) or (level - best)
    if room and math.isfinite(room):
        bottom, top = sorted((best - 0.05 * room, worst + 0.08 * room))
        axes.set_ylim(bottom, top)


def _untrained_line(axes: Axes, level: float, theme: Theme, like: float, *, told: bool = True) -> None:
    """The untrained level as a line, or as a note at the edge beyond which it lies."""
    if not math.isfinite(level):
        return
    bottom, top = axes.get_ylim()
    if bottom <= level <= top:
        axes.axhline(level, color=theme.faint, lw=1.2, linestyle=(0, (1, 2)), label="untrained")
    elif told:
        above = level > top
        axes.annotate(
            f"{'↑' if above else '↓'} untrained: {wording.figure(level, like)}",
            (0.98, 0.97 if above else 0.03),
            xycoords="axes fraction",
            ha="right",
            va="top" if above else "bottom",
            color=theme.faint,
            fontsize=9,
            bbox={"facecolor": theme.ground, "edgecolor": "none", "pad": 1.5},
            zorder=5,
        )


def _crosses(
    axes: Axes, lost: Sequence[Record], losers: Sequence[str], styles: dict[str, Mark], theme: Theme
) -> None:
    """A row of crosses for each optimizer that lost a trial: on one row they would hide each other."""
    for row, label in enumerate(losers):
        lrs = [record.lr for record in lost if record.optimizer == label]
        cross: dict[str, Any] = {"color": styles[label].color, "ms": 6, "mew": 1.8}
        axes.plot(lrs, [row] * len(lrs), "x", **cross)
    axes.set_ylim(len(losers) - 0.5, -0.5)
    axes.set_yticks(range(len(losers)), losers, fontsize=8)
    axes.tick_params(axis="y", labelcolor=theme.ink, length=0)
    axes.grid(visible=False, axis="y")


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
