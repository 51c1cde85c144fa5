"""The charts of a report. Each is a figure of Vega-Lite panels, the same for the page, PNG and SVG.

No chart names a colour: those come from the theme's `config`. Every chart has a parameter `focus`, an optimizer's
name, which dims all others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from altair.utils import schemapi

from ..analysis import frame
from ..analysis.ranking import cells, good_region, mean_curve, step_ms, target_value, tuned
from .merge import Section
from .table import decimals, number
from .theme import Mode, Style, config

Spec = dict[str, Any]
CROSS = "M-1,-1L1,1M1,-1L-1,1"
_ROWS = 340
_SMALL = 190


@dataclass(frozen=True)
class Figure:
    """One chart, or small multiples of it."""

    key: str
    title: str
    caption: str
    alt: str
    """What the picture shows, for those who do not see it."""
    panels: list[Spec]
    """Vega-Lite specifications without width and config."""
    data: pd.DataFrame
    columns: int = 1


def figures(section: Section, styles: Mapping[str, Style]) -> list[Figure]:
    """Return the figures for which a section has data; bytes of state against quality is the first."""
    draw = _Draw(styles)
    with schemapi.debug_mode(False):  # checking each object against the schema would take most of the time
        made = [make(section, draw) for make in (frontier, curves, search, heat_maps, horizon, costs)]
        return [figure for figure in made if figure is not None] + series(section, draw)


def chart(figure: Figure, styles: Mapping[str, Style], mode: Mode, width: int = 760) -> Spec:
    """Return a figure as one Vega-Lite specification in a theme, `width` pixels wide."""
    each = width // figure.columns - 70
    panels = [{k: v for k, v in {**panel, "width": each}.items() if k != "params"} for panel in figure.panels]
    return {
        "$schema": alt.SCHEMA_URL,
        "title": {"text": figure.title, "fontSize": 16},
        "params": [{"name": "focus", "value": ""}],
        "columns": figure.columns,
        "concat": panels,
        "config": config(styles, mode),
        "datasets": {k: v for panel in panels for k, v in panel.pop("datasets", {}).items()},
    }


def picture(spec: Spec, suffix: Literal["png", "svg"]) -> bytes:
    """Return a `chart` as PNG or SVG."""
    if suffix == "svg":
        return vl_convert.vegalite_to_svg(spec).encode()
    return bytes(vl_convert.vegalite_to_png(spec, scale=2))


class _Draw:
    """The channels by which an optimizer is known: colour, shape and dash."""

    def __init__(self, styles: Mapping[str, Style]) -> None:
        self.styles = styles
        self.names = list(styles)

    def color(self, shown: Sequence[str]) -> alt.Color:
        """The optimizer's colour, with a legend of those shown."""
        return alt.Color("optimizer:N").scale(domain=self.names).legend(title=None, values=[*shown])

    def shape(self, shown: Sequence[str]) -> alt.Shape:
        """The optimizer's shape."""
        paths = [style.shape for style in self.styles.values()]
        return alt.Shape("optimizer:N").scale(domain=self.names, range=paths).legend(title=None, values=[*shown])

    def dash(self) -> alt.StrokeDash:
        """The optimizer's dashes."""
        dashes = [list(style.dash) for style in self.styles.values()]
        return alt.StrokeDash("optimizer:N").scale(domain=self.names, range=dashes).legend(None)

    def lines(
        self, table: pd.DataFrame, x: alt.X, y: alt.Y, tips: Sequence[str], means: pd.DataFrame | None = None
    ) -> alt.LayerChart:
        """Draw a thin line per seed and the means on top; without `means`, the rows themselves are the means."""
        shown = _known(self.names, table)
        color, layers = self.color(shown), []
        if means is not None:
            thin = alt.Chart(table).mark_line(strokeWidth=1, clip=True, interpolate="linear")
            layers.append(
                thin.encode(
                    x=x, y=y, color=color, detail=alt.Detail("seed:N"), opacity=_opacity(0.35), tooltip=_tips(*tips, "seed:Q")
                )
            )
        base = alt.Chart(table if means is None else means)
        layers += [
            base.mark_line(strokeWidth=2.2, clip=True).encode(
                x=x, y=y, color=color, strokeDash=self.dash(), opacity=_opacity(1)
            ),
            base.mark_point(size=50, opacity=1, clip=True).encode(
                x=x, y=y, color=color, shape=self.shape(shown), opacity=_opacity(1), tooltip=_tips(*tips)
            ),
        ]
        return _layer(layers)


def frontier(section: Section, draw: _Draw) -> Figure | None:
    """Draw bytes of state per parameter against the test metric, a point a seed, with the frontier."""
    metric = section.experiment.metric
    rows = [row for row in section.rows if row.test.finite]
    if not rows:
        return None
    low, high = _range([v for row in rows for v in row.test.finite], metric.lower_is_better)
    seeds = pd.DataFrame(
        [(r.optimizer, r.state_bytes, v, min(max(v, low), high)) for r in rows for v in r.test.finite],
        columns=["optimizer", "bytes", "value", "at"],
    )
    means = pd.DataFrame(
        [(r.optimizer, r.state_bytes, r.test.mean, r.test.std) for r in rows],
        columns=["optimizer", "bytes", "value", "std"],
    )
    means["at"] = means["value"].clip(low, high)
    means["spread"] = [number(std) or "one seed" for std in means["std"]]
    means["label"] = _label_places(means, (high - low) * 16 / _ROWS)
    best = [r for r in rows if not any(_dominates(other, r, metric.score) for other in rows)]
    best.sort(key=lambda row: row.state_bytes)
    line = means.set_index("optimizer").loc[[row.optimizer for row in best]].reset_index()
    widest = max(1.0, float(means["bytes"].max()))
    shown = _known(draw.names, means)
    x = alt.X("bytes:Q", title="state, bytes per parameter", axis=alt.Axis(tickCount=8)).scale(
        domain=[-0.04 * widest, 1.06 * widest], nice=False, zero=False
    )
    y = alt.Y("at:Q", title=_named(section, "test")).scale(domain=[low, high], nice=False, zero=False)
    spread = alt.Tooltip("spread:N", title="±")
    tooltip = _tips("optimizer:N", "bytes:Q", alt.Tooltip("value:Q", title=f"mean {metric.name}"), spread)
    outside = seeds[seeds["value"] != seeds["at"]]
    layers = [
        alt.Chart(line).mark_line(style="frontier", interpolate="step-after").encode(x=x, y=y, order=alt.Order("bytes:Q")),
        alt.Chart(seeds[seeds["value"] == seeds["at"]])
        .mark_point(size=38)
        .encode(x=x, y=y, color=draw.color(shown), shape=draw.shape(shown), opacity=_opacity(0.45),
                tooltip=_tips("optimizer:N", "bytes:Q", "value:Q")),
        alt.Chart(means).mark_rule(style="frontier", strokeDash=[1, 0], strokeWidth=0.6).encode(x=x, y=y, y2=alt.Y2("label:Q")),
        alt.Chart(means[means["value"] == means["at"]])
        .mark_point(size=150)
        .encode(x=x, y=y, color=draw.color(shown), shape=draw.shape(shown), opacity=_opacity(1), tooltip=tooltip),
        *_outside(outside, x, y, metric.lower_is_better, draw),
    ]  # fmt: skip
    # On a phone the plot is about 250 pixels wide, and a letter 7.5.
    room = 250 * (1 - means["bytes"] / (1.1 * widest))
    for left, side in means.groupby(room < 20 + 7.5 * means["optimizer"].str.len()):
        layers.append(
            alt.Chart(side)
            .mark_text(align="right" if left else "left", dx=-11 if left else 11, fontWeight=600)
            .encode(x=x, y=alt.Y("label:Q"), text=alt.Text("optimizer:N"), opacity=_opacity(1))
        )
    each = "; ".join(f"{r.optimizer} {number(r.state_bytes)} bytes, {number(r.test.mean, 4)}" for r in rows)
    on = ", ".join(row.optimizer for row in best)
    missing = [row.optimizer for row in section.rows if not row.test.finite]
    return Figure(
        "frontier",
        "State against quality",
        f"Small marks are seeds, large ones their mean. Left is less memory, {'down' if metric.lower_is_better else 'up'} "
        "is better. On the dashed frontier no other optimizer is better with as little state."
        + (f" Not drawn, for lack of a final result: {', '.join(missing)}." if missing else ""),
        f"State per parameter and mean {metric.name} on test data: {each}. On the frontier: {on}.",
        [_panel(_layer(layers), _ROWS, zoom=True)],
        seeds.drop(columns="at"),
    )


def curves(section: Section, draw: _Draw) -> Figure | None:
    """Draw the metric against steps and against seconds, and the training loss."""
    experiment = section.experiment
    final = tuned(experiment, section.trials)
    if final.empty:
        return None
    kept = [r for r in section.records if r.phase == "tuned" and r.steps == final["steps"].iloc[0]]
    points, losses = _finite(frame.evaluations(kept, experiment.metric.name)), _finite(frame.losses(kept))
    if points.empty:
        return None
    per_step = {row.optimizer: step_ms(row.cost) / 1000 for row in section.rows}
    timed = not any(math.isnan(per_step[name]) for name in points["optimizer"].unique())
    if timed:
        points["seconds"] = points["step"] * points["optimizer"].map(per_step)
    lower = experiment.metric.lower_is_better
    late = points[points["step"] >= 0.1 * points["step"].max()]
    low, high = _range(late["value"], lower)
    hidden = int(((points["value"] < low) | (points["value"] > high)).sum())
    target = target_value(experiment, section.trials)
    panels, means = [], _means(points)
    y = alt.Y("value:Q", title=_named(section, "validation")).scale(domain=[low, high], nice=False, zero=False)
    for x, title in (("step", "steps"), ("seconds", "seconds of training")):
        at = alt.X(f"{x}:Q", title=title).scale(nice=False)
        layer = draw.lines(points, at, y, ["optimizer:N", "step:Q", "seconds:Q", "value:Q"], means)
        if low <= target <= high:
            rule = alt.Chart(pd.DataFrame({"value": [target]})).mark_rule(style="frontier")
            layer = alt.layer(layer, rule.encode(y=y))
        panels.append(_panel(layer, 300, title=f"{experiment.metric.name} against {title}", zoom=True))
    if not losses.empty:
        late_losses = losses[losses["step"] >= 0.1 * losses["step"].max()]
        bounds = _range(late_losses["value"], True)
        loss = alt.Y("value:Q", title="training loss").scale(domain=bounds, nice=False, zero=False)
        at = alt.X("step:Q", title="steps").scale(nice=False)
        layer = draw.lines(losses, at, loss, ["optimizer:N", "step:Q", "value:Q"], _means(losses))
        panels.append(_panel(layer, 300, title="training loss against steps", zoom=True))
    ends = "; ".join(
        f"{row.optimizer} ends at {number(float(final[final['optimizer'] == row.optimizer]['validation'].mean()), 4)}"
        + (f" and reaches the target after {number(row.steps_to_target, 4)} steps" if row.steps_to_target > 0 else "")
        for row in section.rows
        if row.test.finite
    )
    return Figure(
        "curves",
        "Over steps and seconds",
        "Thin lines are seeds, thick ones their mean. "
        + ("Seconds are steps × the timed milliseconds of a training step. " if timed else "Seconds as they passed. ")
        + (f"The dashed line is {experiment.baseline}'s final value. " if low <= target <= high else "")
        + (f"{hidden} points lie beyond the drawn range." if hidden else ""),
        f"{experiment.metric.name} on validation data: {ends}.",
        panels,
        points,
        columns=3,
    )


def search(section: Section, draw: _Draw) -> Figure | None:
    """Draw the search of each optimizer: the learning rate, on its own logarithmic axis, against the metric."""
    found = section.trials[section.trials["phase"] == "search"]
    found = found[[searched.get("lr", 0) > 0 for searched in found["searched"]]]
    if found.empty:
        return None
    metric, lower = section.experiment.metric, section.experiment.metric.lower_is_better
    settings = pd.DataFrame(list(found["searched"]), index=found.index)
    table = settings.assign(optimizer=found["optimizer"], value=found["validation"], seed=found["seed"])
    low, high = _range(table["value"], lower)
    table["at"] = table["value"].clip(low, high).fillna(high if lower else low)
    y = alt.Y("at:Q", title=None).scale(domain=[low, high], nice=False, zero=False)
    panels, words = [], []
    for row in section.rows:
        own = table[table["optimizer"] == row.optimizer]
        if own.empty:
            continue
        ends = [own["lr"].min() / 1.8, own["lr"].max() * 1.8]
        decades = [10.0**k for k in range(math.ceil(math.log10(ends[0])), math.floor(math.log10(ends[1])) + 1)]
        axis = alt.Axis(values=decades if len(decades) > 1 else [*own["lr"].unique()], format="~e", title="lr", grid=True)
        x = alt.X("lr:Q", axis=axis).scale(type="log", domain=ends, nice=False)
        finite, diverged = own[own["value"].notna()], own[own["value"].isna()]
        inside, outside = finite[finite["value"] == finite["at"]], finite[finite["value"] != finite["at"]]
        names = [f"{name}:Q" for name in settings.columns]
        tooltip = _tips("optimizer:N", *names, alt.Tooltip("value:Q", title=metric.name), "seed:Q")
        channels: dict[str, Any] = {"x": x, "y": y, "opacity": _opacity(0.85), "tooltip": tooltip}
        drawn = draw.color([row.optimizer])
        layers = [
            alt.Chart(inside)
            .mark_point(size=60)
            .encode(**channels, color=drawn.legend(None), shape=draw.shape([]).legend(None)),
            alt.Chart(diverged)
            .mark_point(size=70, shape=CROSS, filled=False, strokeWidth=2, style="outline")
            .encode(**channels),
            *_outside(outside, x, y, lower, draw),
        ]
        if row.best and len(inside):
            same = np.logical_and.reduce([inside[name] == value for name, value in row.best.items()])
            layers.append(
                alt.Chart(inside[same]).mark_point(size=230, style="outline", filled=False).encode(x=x, y=y)
            )
        best = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in row.best.items()) or "all diverged"
        panels.append(_panel(_layer(layers), _SMALL, title=[row.optimizer, best], optimizer=row.optimizer))
        words.append(f"{row.optimizer}: best at {best}; {len(diverged)} of {len(own)} diverged")
    return Figure(
        "search",
        "The search",
        f"{metric.name} on validation data for every learning rate tried, each at its own place on a logarithmic axis; "
        "all panels share the vertical axis. A ring marks the choice. A cross diverged (its height means nothing); an "
        "arrow lies beyond the drawn range, at the value written beside it.",
        f"Learning rate against {metric.name}. {'. '.join(words)}.",
        panels,
        table.drop(columns="at"),
        columns=3,
    )


def heat_maps(section: Section, draw: _Draw) -> Figure | None:
    """Draw a heat map per optimizer of the first two hyper-parameters of a grid."""
    found, metric = section.trials[section.trials["phase"] == "search"], section.experiment.metric
    tables, panels, words = [], [], []
    for row in section.rows:
        own = cells(found[found["optimizer"] == row.optimizer])
        names = [n for n in own.columns if n not in ("validation", "diverged", "good") and own[n].nunique() > 1]
        names.sort(key=lambda name: name != "lr")
        if len(names) < 2 or own[names[0]].nunique() * own[names[1]].nunique() > 1.5 * len(own):
            continue  # not a grid
        x, y = names[:2]
        score = own["validation"].map(metric.score)
        # Of further hyper-parameters, a cell shows the best setting.
        best_first = own.assign(score=score, good=good_region(section.experiment, own)).sort_values("score")
        grid = best_first.groupby([x, y], as_index=False).first().assign(optimizer=row.optimizer)
        worst = _range(score, True)[1]
        grid["shade"] = ((worst - grid["score"]) / ((worst - grid["score"].min()) or 1)).clip(0, 1)
        grid["text"] = ["×" if math.isnan(v) else f"{v:.{min(3, decimals(section.rows))}f}" for v in grid["validation"]]
        grid["best"] = grid["score"] == grid["score"].min()
        at: dict[str, Any] = {
            "x": alt.X(f"{x}:O", title=x.replace("_", " "), axis=alt.Axis(format="~g", labelAngle=0)),
            "y": alt.Y(f"{y}:O", title=y.replace("_", " "), sort="descending", axis=alt.Axis(format="~g")),
        }
        base, finite = alt.Chart(grid), alt.Chart(grid[~grid["diverged"]])
        good = alt.Tooltip("good:N", title="within 1 %")
        tooltip = _tips("optimizer:N", f"{x}:Q", f"{y}:Q", alt.Tooltip("text:N", title=metric.name), good)
        dark = alt.ColorValue("#ffffff", condition={"test": "datum.shade > 0.5", "value": "#000000"})
        layers = [
            base.mark_rect(style="empty").encode(**at, tooltip=tooltip),
            finite.mark_rect().encode(
                **at,
                color=alt.Color("shade:Q", legend=None).scale(scheme="cividis", domain=[0, 1]),
                tooltip=tooltip,
            ),
            finite.mark_text(fontSize=11).encode(**at, text=alt.Text("text:N"), color=dark),
            alt.Chart(grid[grid["diverged"]]).mark_text(fontSize=13).encode(**at, text=alt.Text("text:N")),
            alt.Chart(grid[grid["good"]]).mark_rect(style="outline", strokeDash=[3, 2]).encode(**at),
            alt.Chart(grid[grid["best"]]).mark_rect(style="outline", strokeWidth=3).encode(**at),
        ]
        share = f"{row.good_cells} of {row.cells} cells within 1 %"
        title, top = [row.optimizer, share], best_first.iloc[0]
        panels.append(_panel(_layer(layers), 45 + 34 * grid[y].nunique(), title=title, optimizer=row.optimizer))
        words.append(f"{row.optimizer}: best {number(top['validation'], 4)} at {x} {top[x]:g}, {y} {top[y]:g}; {share}")
        tables.append(grid.drop(columns=["score", "shade", "text"]))
    if not panels:
        return None
    return Figure(
        "grid",
        "The grid",
        f"{metric.name} on validation data, bright is good. The best cell has a thick border, those within 1 % of it a "
        "dashed one: the more there are, the less tuning matters. × diverged.",
        f"Heat maps of {metric.name}. {'. '.join(words)}.",
        panels,
        pd.concat(tables),
        columns=2,
    )


def horizon(section: Section, draw: _Draw) -> Figure | None:
    """Draw the test metric against the number of steps for which a trial was planned."""
    found = section.trials[(section.trials["phase"] == "tuned") & section.trials["test"].notna()]
    if found["steps"].nunique() < 2:
        return None
    points = found[["optimizer", "seed", "steps", "test"]].rename(columns={"test": "value"})
    means = points.groupby(["optimizer", "steps"], as_index=False)["value"].mean()
    low, high = _range(points["value"], section.experiment.metric.lower_is_better)
    x = alt.X("steps:Q", title="steps planned", axis=alt.Axis(values=[*map(int, sorted(points["steps"].unique()))])).scale(
        type="log", nice=False
    )
    y = alt.Y("value:Q", title=_named(section, "test")).scale(domain=[low, high], nice=False, zero=False)
    layer = draw.lines(points, x, y, ["optimizer:N", "steps:Q", "value:Q"], means)
    each = "; ".join(
        f"{name} from {number(own['value'].iloc[0], 4)} at {own['steps'].iloc[0]} to "
        f"{number(own['value'].iloc[-1], 4)} at {own['steps'].iloc[-1]} steps"
        for name, own in means.groupby("optimizer")
    )
    return Figure(
        "horizon",
        "Short and long runs",
        "Each point is a run whose schedule ends there. Thin lines are seeds, thick ones their mean.",
        f"{section.experiment.metric.name} on test data against the length of the run: {each}.",
        [_panel(layer, 300, zoom=True)],
        points,
    )


def costs(section: Section, draw: _Draw) -> Figure | None:
    """Draw step time, state and peak bytes against the size of the model, log-log; planned points are hollow."""
    quantities = {
        "optimizer_ms": "milliseconds of a step",
        "state_bytes": "bytes of state",
        "peak_bytes": "peak bytes of a step",
    }
    table = pd.DataFrame(
        [
            (c.optimizer, c.model, c.parameters, quantity, float(value), c.planned)
            for c in section.experiment.costs.values()
            for quantity in quantities
            if (value := getattr(c, quantity)) is not None and value > 0
        ],
        columns=["optimizer", "model", "parameters", "quantity", "value", "planned"],
    ).sort_values("parameters")
    if table["parameters"].nunique() < 2:
        return None
    x = alt.X("parameters:Q", title="parameters", axis=alt.Axis(format="~s", tickCount=4)).scale(type="log", nice=False)
    panels = []
    for quantity, title in quantities.items():
        own = table[table["quantity"] == quantity]
        if own.empty:
            continue
        y = alt.Y("value:Q", title=title, axis=alt.Axis(format="~s", tickCount=5)).scale(type="log")
        shown, tooltip = _known(draw.names, own), _tips("optimizer:N", "model:N", "parameters:Q", "value:Q", "planned:N")
        marks: dict[str, Any] = {
            "x": x, "y": y, "color": draw.color(shown), "shape": draw.shape(shown), "opacity": _opacity(1),
            "tooltip": tooltip,
        }  # fmt: skip
        line = alt.Chart(own).mark_line(strokeWidth=1.6)
        layers = [
            line.encode(x=x, y=y, color=marks["color"], strokeDash=draw.dash(), opacity=_opacity(0.8)),
            alt.Chart(own[~own["planned"]]).mark_point(size=70).encode(**marks),
            alt.Chart(own[own["planned"]]).mark_point(size=70, filled=False, strokeWidth=1.8).encode(**marks),
        ]
        panels.append(_panel(_layer(layers), 300, title=title, zoom=True))
    largest = table[(table["quantity"] == "state_bytes") & (table["parameters"] == table["parameters"].max())]
    each = "; ".join(f"{name} {number(v / 2**30)} GiB" for name, v in zip(largest["optimizer"], largest["value"], strict=True))
    return Figure(
        "costs",
        "What a step costs, against the size of the model",
        "Both axes are logarithmic. Hollow points were planned on the meta device, because the model did not fit.",
        f"Costs for models of {number(table['parameters'].min())} to {number(table['parameters'].max())} parameters. "
        f"State at the largest: {each}.",
        panels,
        table,
        columns=2,
    )


def series(section: Section, draw: _Draw) -> list[Figure]:
    """Draw the trials' further measurements, named `quantity/tensor`: a figure per quantity, a panel per tensor.

    With more than twelve tensors there is a panel per optimizer instead, with a line per tensor.
    """
    points = _finite(frame.series(section.records))
    made: list[Figure] = []
    if points.empty:
        return made
    names = points["name"].str.partition("/")
    for quantity, table in points.assign(quantity=names[0], tensor=names[2]).groupby("quantity"):
        by = ["optimizer", "tensor", "step"]
        means = table.groupby(by, as_index=False)["value"].mean()
        low, high = means["value"].min(), means["value"].max()
        wide = low > 0 and high > 30 * low
        scale = alt.Scale(type="log", domain=[low, high]) if wide else alt.Scale(domain=[low, high], zero=False)
        y = alt.Y("value:Q", title=None, scale=scale)
        x = alt.X("step:Q", title="steps").scale(nice=False)
        many = means["tensor"].nunique() > 12
        panels = []
        for name, own in means.groupby("optimizer" if many else "tensor"):
            if many:
                line = alt.Chart(own).mark_line(strokeWidth=1).encode(
                    x=x, y=y, detail=alt.Detail("tensor:N"), color=draw.color([]).legend(None), opacity=_opacity(0.7),
                    tooltip=_tips("optimizer:N", "tensor:N", "step:Q", "value:Q"),
                )  # fmt: skip
                panels.append(_panel(_layer([line]), _SMALL, title=str(name), optimizer=str(name)))
            else:
                layer = draw.lines(own, x, y, ["optimizer:N", "tensor:N", "step:Q", "value:Q"])
                panels.append(_panel(layer, _SMALL, title=str(name or quantity)))
        spans = "; ".join(
            f"{name} from {number(v.min())} to {number(v.max())}" for name, v in means.groupby("optimizer")["value"]
        )
        made.append(
            Figure(
                "series-" + "".join(c if c.isalnum() else "-" for c in str(quantity)),
                str(quantity).replace("_", " ").capitalize(),
                "Means over the seeds; all panels share the vertical axis" + (", which is logarithmic." if wide else "."),
                f"{quantity} over the steps: {spans}.",
                panels,
                means,
                columns=3,
            )
        )
    return made


def _panel(
    layer: alt.LayerChart, height: int, title: str | list[str] = "", *, zoom: bool = False, optimizer: str = ""
) -> Spec:
    if zoom:
        moved = "[pointerdown[event.shiftKey], window:pointerup] > window:pointermove!"
        layer = layer.add_params(
            alt.selection_interval(bind="scales", translate=moved, zoom="wheel![event.shiftKey]")
        )
    layer = layer.add_params(alt.param(name="focus", value=""))
    spec: Spec = layer.to_dict(context={"pre_transform": False}, validate=False)
    for key in ("$schema", "config"):
        spec.pop(key, None)
    spec |= {"height": height, "usermeta": {"optimizer": optimizer}}
    if isinstance(title, list):
        spec["title"] = {"text": title[0], "subtitle": title[1:]}
    elif title:
        spec["title"] = title
    return spec


def _layer(charts: Sequence[alt.Chart]) -> alt.LayerChart:
    return alt.layer(*(chart for chart in charts if len(chart.data)))  # Vega warns of a scale without data


def _outside(table: pd.DataFrame, x: alt.X, y: alt.Y, lower: bool, draw: _Draw) -> list[alt.Chart]:
    """Draw arrows at the range's end for values beyond it, with the values as text."""
    if table.empty:
        return []
    field = str(x.shorthand).split(":")[0]  # type: ignore[attr-defined]
    ends = table.groupby(["optimizer", field, "at"], as_index=False)["value"].agg(["min", "max"])
    ends["text"] = ["–".join(dict.fromkeys((number(a), number(b)))) for a, b in zip(ends["min"], ends["max"], strict=True)]
    arrows = alt.Chart(table).mark_point(shape="triangle-up" if lower else "triangle-down", size=80)
    tooltip, color = _tips("optimizer:N", f"{field}:Q", "value:Q"), draw.color([]).legend(None)
    words = alt.Chart(ends).mark_text(dy=14 if lower else -14, fontSize=11)
    return [
        arrows.encode(x=x, y=y, opacity=_opacity(1), tooltip=tooltip, color=color),
        words.encode(x=x, y=y, opacity=_opacity(1), text=alt.Text("text:N")),
    ]


def _range(values: Any, lower_is_better: bool) -> tuple[float, float]:
    """Return the range to draw: all values but those much worse than the median, with a margin."""
    sign = 1 if lower_is_better else -1
    scores = np.sort(sign * np.asarray([v for v in values if math.isfinite(v)], dtype=float))
    if not len(scores):
        return 0.0, 1.0
    best = scores[0]
    spread = max(float(np.median(scores)) - best, 0.1 * (scores[-1] - best) if len(scores) < 4 else 0.0)
    worst = scores[scores <= best + 4 * spread][-1]
    margin = 0.08 * (worst - best) or 0.02 * abs(best) or 1.0
    low, high = sorted((sign * (best - margin), sign * (worst + margin)))
    return float(low), float(high)


def _label_places(means: pd.DataFrame, gap: float) -> list[float]:
    """Return heights at which the labels of nearby points do not overlap."""
    near = 0.25 * max(1.0, float(means["bytes"].max()))
    placed: list[tuple[float, float]] = []
    for x, y in zip(means["bytes"], means["at"], strict=True):
        shifts = sorted(range(-len(means), len(means) + 1), key=abs)
        free = (y + s * gap for s in shifts if all(abs(x - a) > near or abs(y + s * gap - b) >= gap * 0.99 for a, b in placed))
        placed.append((x, next(free, y)))
    return [y for _, y in placed]


def _dominates(a: Any, b: Any, score: Any) -> bool:
    better, less = score(a.test.mean) - score(b.test.mean), a.state_bytes - b.state_bytes
    return better <= 0 and less <= 0 and (better < 0 or less < 0)


def _means(points: pd.DataFrame) -> pd.DataFrame:
    """Return the mean curves over the seeds."""
    made = []
    for name, own in points.groupby("optimizer"):
        curve = pd.DataFrame(mean_curve(own), columns=["step", "value"]).assign(optimizer=name)
        seconds = own.groupby("step")["seconds"].mean()
        made.append(curve.assign(seconds=curve["step"].map(seconds)))
    return pd.concat(made)


def _finite(points: pd.DataFrame) -> pd.DataFrame:
    return points[np.isfinite(points["value"].astype(float))].copy()


def _known(names: Sequence[str], table: pd.DataFrame) -> list[str]:
    present = set(table["optimizer"])
    return [name for name in names if name in present]


def _named(section: Section, split: str) -> str:
    metric = section.experiment.metric
    return f"{split} {metric.name}" + (f" ({metric.unit})" if metric.unit else "")


def _opacity(value: float) -> alt.OpacityValue:
    test = "focus == '' || datum.optimizer == focus"
    return alt.OpacityValue(0.07, condition={"test": test, "value": value})


def _tips(*fields: str | alt.Tooltip) -> list[alt.Tooltip]:
    return [alt.Tooltip(field) if isinstance(field, str) else field for field in fields]
