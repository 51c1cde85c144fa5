"""Charts of the search: each optimizer's trials over a hyper-parameter, and heat maps of grids."""

from __future__ import annotations

import math
from typing import Any

import altair as alt
import pandas as pd

from ..analysis.ranking import cells, good_region
from .draw import Draw, Figure, drawn_range, opacity, panel, within
from .merge import Section
from .table import decimals, number

CROSS = "M-1,-1L1,1M1,-1L-1,1"


def search_charts(section: Section, draw: Draw) -> list[Figure | None]:
    """Return the charts of the search. A grid's heat map shows all that charts of its other axes would."""
    grid = heat_maps(section)
    names = dict.fromkeys(name for searched in section.trials["searched"] for name in searched)
    return [*(over(section, draw, name) for name in names if name == "lr" or grid is None), grid]


def over(section: Section, draw: Draw, name: str) -> Figure | None:
    """Draw each optimizer's search: a hyper-parameter, on its own logarithmic axis, against the metric."""
    trials = section.trials[section.trials["phase"] == "search"]
    settings = pd.DataFrame(list(trials["searched"]), index=trials.index)
    if name not in settings or settings[name].nunique() < 2 or settings[name].min() <= 0:
        return None
    metric, label = section.experiment.metric, name.replace("_", " ")
    lower = metric.lower_is_better
    table = settings.assign(optimizer=trials["optimizer"], value=trials["validation"], seed=trials["seed"])
    best = {row.optimizer: row.best for row in section.rows}
    pairs = zip(trials["optimizer"], trials["searched"], strict=True)
    table["chosen"] = [searched == best[label] for label, searched in pairs]
    table = table.dropna(subset=name)
    low, high = drawn_range(table["value"], lower)
    table["at"] = table["value"].clip(low, high).fillna(high if lower else low)
    y = within("at:Q", None, (low, high))
    value = alt.Tooltip("value:Q", title=metric.name)
    tip = ["optimizer:N", *(f"{column}:Q" for column in settings), value, "seed:Q"]
    panels, words = [], []
    for row in section.rows:
        own = table[table["optimizer"] == row.optimizer]
        if own.empty:
            continue
        ends = [own[name].min() / 1.8, own[name].max() * 1.8]
        axis = alt.Axis(values=_ticks(*ends), format=".2~e", title=label)
        x = alt.X(f"{name}:Q", axis=axis).scale(type="log", domain=ends, nice=False)
        inside, diverged = own[own["value"] == own["at"]], own[own["value"].isna()]
        trial: dict[str, Any] = {"x": x, "y": y, "tooltip": tip, "opacity": opacity(0.85)}
        outline: dict[str, Any] = {"style": "outline", "filled": False}
        cross = alt.Chart(diverged).mark_point(size=70, shape=CROSS, strokeWidth=2, **outline)
        ring = alt.Chart(inside[inside["chosen"]]).mark_point(size=230, **outline)
        charts = [
            alt.Chart(inside).mark_point(size=60).encode(**trial, color=draw.color(), shape=draw.shape()),
            cross.encode(**trial),
            ring.encode(x=x, y=y),
            *draw.outside(own[own["value"].notna() & (own["value"] != own["at"])], x, y, lower),
        ]
        at = ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in row.best.items()) or "all diverged"
        panels.append(panel(charts, 190, row.optimizer, at, optimizer=row.optimizer))
        words.append(f"{row.optimizer}: best at {at}; {len(diverged)} of {len(own)} diverged")
    return Figure(
        "search" if name == "lr" else f"search-{name}",
        f"The search: {label}",
        f"{metric.name} on validation data for every {label} tried, on a logarithmic axis; all panels share "
        "the vertical axis. A ring marks the value chosen. A cross is a run that diverged; its height means "
        "nothing. An arrow is a run outside the plot, with its value beside it.",
        f"{label} against {metric.name}. {'. '.join(words)}.",
        panels,
        table.drop(columns="at"),
        columns=3,
    )


def _ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten between, or if they are fewer than two, their multiples by 1, 2 and 5."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [(factor, factor * 10.0**power) for power in powers for factor in (1, 2, 5)]
    ticks = [(factor, tick) for factor, tick in every if low <= tick <= high]
    tens = [tick for factor, tick in ticks if factor == 1]
    return tens if len(tens) > 1 else [tick for _, tick in ticks]


def heat_maps(section: Section) -> Figure | None:
    """Draw a heat map per optimizer of the first two hyper-parameters of a grid."""
    trials, metric = section.trials[section.trials["phase"] == "search"], section.experiment.metric
    places = min(3, decimals([row.test for row in section.rows]))
    tables, panels, words = [], [], []
    for row in section.rows:
        own = cells(trials[trials["optimizer"] == row.optimizer])
        names = [name for name in own if name not in ("validation", "diverged") and own[name].nunique() > 1]
        names.sort(key=lambda name: name != "lr")
        if len(names) < 2 or own[names[0]].nunique() * own[names[1]].nunique() > 1.5 * len(own):
            continue  # not a grid
        x, y = names[:2]
        own = own.assign(score=own["validation"].map(metric.score), good=good_region(section.experiment, own))
        # Of further hyper-parameters, a cell shows the best setting.
        grid = own.sort_values("score").groupby([x, y], as_index=False).first()
        grid["optimizer"] = row.optimizer
        best, worst = grid["score"].min(), drawn_range(own["score"], True)[1]
        grid["shade"] = ((worst - grid["score"]) / ((worst - best) or 1)).clip(0, 1)
        grid["text"] = ["×" if math.isnan(value) else f"{value:.{places}f}" for value in grid["validation"]]
        grid["best"] = grid["score"] == best
        columns = alt.X(f"{x}:O", title=x.replace("_", " "), axis=alt.Axis(format="~g", labelAngle=0))
        rows = alt.Y(f"{y}:O", title=y.replace("_", " "), sort="descending", axis=alt.Axis(format="~g"))
        value, good = alt.Tooltip("text:N", title=metric.name), alt.Tooltip("good:N", title="within 1 %")
        trained = alt.Chart(grid[~grid["diverged"]])
        shade = alt.Color("shade:Q", legend=None).scale(scheme="cividis", domain=[0, 1])
        ink = alt.ColorValue("#ffffff", condition={"test": "datum.shade > 0.5", "value": "#000000"})
        tip = ["optimizer:N", f"{x}:Q", f"{y}:Q", value, good]
        charts = [
            alt.Chart(grid).mark_rect(style="empty").encode(tooltip=tip),
            trained.mark_rect().encode(color=shade, tooltip=tip),
            trained.mark_text(fontSize=11).encode(text="text:N", color=ink),
            alt.Chart(grid[grid["diverged"]]).mark_text(fontSize=13).encode(text="text:N"),
            alt.Chart(grid[grid["good"]]).mark_rect(style="outline", filled=False, strokeDash=[3, 2]),
            alt.Chart(grid[grid["best"]]).mark_rect(style="outline", filled=False, strokeWidth=3),
        ]
        share, height = f"{row.good_cells} of {row.cells} cells within 1 %", 45 + 34 * grid[y].nunique()
        drawn = [each.encode(x=columns, y=rows) for each in charts]
        panels.append(panel(drawn, height, row.optimizer, share, optimizer=row.optimizer))
        at = ", ".join(f"{x} {cell[x]:g}, {y} {cell[y]:g}" for _, cell in grid[grid["best"]].iterrows())
        words.append(f"{row.optimizer}: best {number(metric.score(best), 4)} at {at or 'none'}; {share}")
        tables.append(grid.drop(columns=["score", "shade", "text"]))
    if not panels:
        return None
    return Figure(
        "grid",
        "The grid",
        f"{metric.name} on validation data; brighter is better. The best cell has a thick border, and those "
        "within 1 % of it a dashed one: the more of these, the less tuning matters. ×: diverged.",
        f"Heat maps of {metric.name}. {'. '.join(words)}.",
        panels,
        pd.concat(tables),
        columns=2,
    )
