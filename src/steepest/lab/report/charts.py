"""The charts of a report, first bytes of state against quality."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import altair as alt
import pandas as pd
from altair.utils import schemapi

from ..analysis import frame
from ..analysis.ranking import target, tuned
from .draw import Draw, Figure, drawn_range, finite, name_metric, opacity, over_seeds, panel, within
from .merge import Section
from .search_charts import search_charts
from .table import number
from .theme import Style

_HEIGHT = 340


def figures(section: Section, styles: Mapping[str, Style]) -> list[Figure]:
    """Return the figures for which a section has data; bytes of state against quality is the first."""
    draw = Draw(styles)
    with schemapi.debug_mode(False):  # checking each object against the schema would take most of the time
        made = [frontier(section, draw), curves(section, draw), *search_charts(section, draw)]
        made += [horizon(section, draw), costs(section, draw), *series(section, draw)]
    return [figure for figure in made if figure is not None]


def frontier(section: Section, draw: Draw) -> Figure | None:
    """Draw bytes of state per parameter against the test metric, a point a seed, with the frontier."""
    metric, rows = section.experiment.metric, [row for row in section.rows if row.test.finite]
    if not rows:
        return None
    each = [(row.optimizer, row.state_bytes, value) for row in rows for value in row.test.finite]
    seeds = pd.DataFrame(each, columns=["optimizer", "bytes", "value"])
    ends = drawn_range(seeds["value"], metric.lower_is_better)
    means = seeds.groupby("optimizer", sort=False, as_index=False).mean()
    means["spread"] = [number(row.test.std) or "one seed" for row in rows]
    seeds["at"], means["at"] = seeds["value"].clip(*ends), means["value"].clip(*ends)
    shown, mean = seeds[seeds["value"] == seeds["at"]], means[means["value"] == means["at"]]
    outside = seeds[seeds["value"] != seeds["at"]]
    arrow = "↑" if metric.lower_is_better else "↓"
    far = outside.groupby("optimizer")["value"].agg(["min", "max"])
    beyond = {
        name: f" {arrow} {'–'.join(dict.fromkeys(map(number, each)))}" for name, *each in far.itertuples()
    }
    means["text"] = [name.split(":")[-1] + beyond.get(name, "") for name in means["optimizer"]]
    means["label"] = _label_places(means, ends)
    line = means.assign(score=means["value"].map(metric.score)).sort_values(["bytes", "score"])
    line = line[line["score"] == line["score"].cummin()]  # with as little state, nothing is better,
    line = line[line["bytes"] == line.groupby("score")["bytes"].transform("min")]  # nor as good with less
    widest = max(1.0, float(means["bytes"].max()))
    # Most optimizers have 0 to 8 bytes, a few dozens.
    ticks = alt.Axis(values=[0, *(2**power for power in range(int(math.log2(widest)) + 1))])
    x = alt.X("bytes:Q", title="state, bytes per parameter (square-root axis)", axis=ticks)
    x = x.scale(type="sqrt", domain=[-0.002 * widest, 1.12 * widest], nice=False, zero=False)
    y = within("at:Q", name_metric(section, "test"), ends)
    at: dict[str, Any] = {"x": x, "y": y}
    tip = ("optimizer:N", "bytes:Q", alt.Tooltip("value:Q", title=f"mean {metric.name}"))
    steps = alt.Chart(line).mark_line(style="frontier", interpolate="step-after")
    stems = alt.Chart(means).mark_rule(style="frontier", strokeDash=[1, 0], strokeWidth=0.6)
    charts = [
        steps.encode(**at, order="bytes:Q"),
        draw.points(means, 38, *tip[:2], "value:Q", at=shown).encode(**at, opacity=opacity(0.45)),
        stems.encode(**at, y2="label:Q"),
        draw.points(means, 150, *tip, alt.Tooltip("spread:N", title="±"), at=mean).encode(**at),
        *draw.outside(outside, x, y, metric.lower_is_better)[:1],
    ]
    # On a phone the plot is about 250 pixels wide, and a letter 7.5.
    room = 250 * (1 - (means["bytes"] / widest) ** 0.5 / 1.1)
    for left, side in means.groupby(room < 20 + 7.5 * means["text"].str.len()):
        # Above the mark, because the frontier runs beside it.
        place: dict[str, Any] = {"align": "right", "dx": -9} if left else {"align": "left", "dx": 9}
        label = alt.Chart(side).mark_text(dy=-9, fontWeight=600, **place)
        charts.append(label.encode(x=x, y="label:Q", text="text:N", opacity=opacity(1)))
    values = "; ".join(f"{r.optimizer} {number(r.state_bytes)} bytes, {number(r.test.mean, 4)}" for r in rows)
    missing = ", ".join(row.optimizer for row in section.rows if not row.test.finite)
    return Figure(
        "frontier",
        "State against quality",
        "Small marks are single seeds, large ones their means. Further left takes less memory, "
        f"further {'down' if metric.lower_is_better else 'up'} is better. An optimizer lies on the dashed "
        "frontier if no other is better with as little state."
        + (f" Not drawn, because they have no final result: {missing}." if missing else ""),
        f"State per parameter and mean {metric.name} on test data: {values}. On the frontier: "
        f"{', '.join(line['optimizer'])}.",
        [panel(charts, _HEIGHT, zoom=True)],
        seeds.drop(columns="at"),
    )


def curves(section: Section, draw: Draw) -> Figure | None:
    """Draw the metric against steps and against seconds, and the training loss."""
    experiment, metric = section.experiment, section.experiment.metric
    final = tuned(experiment, section.trials)
    records, name = final["record"], metric.name
    evaluated = frame.points(records, lambda r: [(e.step, e.seconds, e.metrics[name]) for e in r.validation])
    losses = finite(frame.points(records, lambda r: r.training_loss))
    step_seconds = {row.optimizer: row.cost.step_ms / 1000 for row in section.rows if row.cost}
    seconds = evaluated["step"] * evaluated["optimizer"].map(step_seconds)
    if timed := bool(seconds.notna().all()):
        evaluated["seconds"] = seconds
    points = finite(evaluated)
    if points.empty:
        return None
    late = 0.1 * points["step"].max()
    ends = drawn_range(points[points["step"] >= late]["value"], metric.lower_is_better)
    hidden = int((~points["value"].between(*ends)).sum())
    goal = metric.score(target(experiment, section.trials))
    goals = pd.DataFrame({"value": [goal] if ends[0] <= goal <= ends[1] else []})
    y = within("value:Q", name_metric(section, "validation"), ends)
    loss = within("value:Q", "training loss", drawn_range(losses[losses["step"] >= late]["value"], True))
    rule = alt.Chart(goals).mark_rule(style="frontier").encode(y=y)
    panels = []
    for table, what, field, title, axis, more in (
        (evaluated, name, "step", "steps", y, [rule]),
        (evaluated, name, "seconds", "seconds of training", y, [rule]),
        (losses, "training loss", "step", "steps", loss, []),
    ):
        x = alt.X(f"{field}:Q", title=title).scale(nice=False, padding=8)
        drawn = draw.lines(table, x, axis, "optimizer:N", "step:Q", "value:Q", "seconds:Q")
        if not table.empty:
            panels.append(panel([*drawn, *more], 300, f"{what} against {title}", zoom=True))
    last = final.groupby("optimizer")["validation"].mean()
    steps = {row.optimizer: number(row.steps_to_target, 4) for row in section.rows if row.steps_to_target > 0}
    reached = {name: f" and reaches the target after {number} steps" for name, number in steps.items()}
    each = "; ".join(f"{n} ends at {number(value, 4)}{reached.get(n, '')}" for n, value in last.items())
    return Figure(
        "curves",
        "Learning curves",
        "Thin lines are single seeds, thick ones their means. "
        + ("Seconds are steps × the measured time of a step. " if timed else "Seconds are wall-clock time. ")
        + (f"The dashed line is {experiment.baseline}'s final value. " if len(goals) else "")
        + (f"{hidden} points lie outside the plot." if hidden else ""),
        f"{metric.name} on validation data: {each}.",
        panels,
        points,
        columns=3,
    )


def horizon(section: Section, draw: Draw) -> Figure | None:
    """Draw the test metric against the number of steps for which a trial was planned."""
    trials = frame.trials(section.experiment, [*section.records, *section.longer])
    final = trials[(trials["phase"] == "tuned") & trials["test"].notna()]
    if final["steps"].nunique() < 2:
        return None
    points = final[["optimizer", "seed", "finished", "steps", "test"]].rename(columns={"test": "value"})
    points["step"] = points["steps"]
    axis = alt.Axis(values=[*map(int, sorted(points["steps"].unique()))])
    x = alt.X("step:Q", title="steps planned", axis=axis).scale(type="log", nice=False, padding=10)
    ends = drawn_range(points["value"], section.experiment.metric.lower_is_better)
    y = within("value:Q", name_metric(section, "test"), ends)
    means = over_seeds(points)
    pairs = zip(means["value"], means["step"], strict=True)
    means["text"] = [f"{number(value, 4)} at {step}" for value, step in pairs]
    each = "; ".join(f"{name} {', '.join(own['text'])}" for name, own in means.groupby("optimizer"))
    return Figure(
        "horizon",
        "Short and long runs",
        "Each point is a run whose schedule ends there. Thin lines are single seeds, thick ones their means.",
        f"{section.experiment.metric.name} on test data against the steps of the run: {each}.",
        [panel(draw.lines(points, x, y, "optimizer:N", "step:Q", "value:Q"), 300, zoom=True)],
        points.drop(columns=["finished", "step"]),
    )


def costs(section: Section, draw: Draw) -> Figure | None:
    """Draw step time, state and peak bytes against the model's size, log-log; planned points are hollow."""
    quantities = {
        "optimizer_ms": "milliseconds of a step",
        "state_bytes": "bytes of state",
        "peak_bytes": "peak bytes of a step",
    }
    ids = ["optimizer", "model", "parameters", "planned"]
    rows = [cost.model_dump(include={*ids, *quantities}) for cost in section.experiment.costs.values()]
    table = pd.DataFrame(rows, columns=[*ids, *quantities]).melt(ids, var_name="quantity")
    table = table.astype({"value": float}).dropna().sort_values("parameters", kind="stable")
    several = table["parameters"].nunique() > 1
    stateless = sorted({*table[(table["quantity"] == "state_bytes") & (table["value"] == 0)]["optimizer"]})
    if several:
        # A logarithmic axis has no zero.
        table = table[table["value"] > 0]
    if table.empty or (section.records and not several):
        return None
    tip = ("optimizer:N", "model:N", "parameters:Q", "value:Q", "planned:N")
    short = alt.Axis(format=".3~s", tickCount=4)
    panels = []
    for quantity, title in quantities.items():
        own = table[table["quantity"] == quantity]
        if own.empty:
            continue
        axis = alt.Axis(format=",~f", tickCount=4) if quantity == "optimizer_ms" else short
        if several:
            x = alt.X("parameters:Q", title="parameters", axis=short).scale(
                type="log", nice=False, padding=10
            )
            y = alt.Y("value:Q", title=title, axis=axis).scale(type="log")
        else:
            x = alt.X("value:Q", title=title, axis=axis).scale(zero=True)
            y = alt.Y("optimizer:N", title=None, sort=[*own.sort_values("value")["optimizer"]])
        line = alt.Chart(own if several else own[:0]).mark_line(strokeWidth=1.6)
        measured, planned = (draw.points(own, 80, *tip, at=own[own["planned"] == p]) for p in (False, True))
        charts = [
            line.encode(color=draw.color(own), strokeDash=draw.dash(), opacity=opacity(0.8)),
            measured,
            planned.mark_point(size=80, filled=False, strokeWidth=1.8),
        ]
        height = 300 if several else 40 + 24 * own["optimizer"].nunique()
        panels.append(panel([each.encode(x=x, y=y) for each in charts], height, title, zoom=several))
    last = table[table["parameters"] == table["parameters"].max()]
    each = "; ".join(
        f"{name} {title} {number(value)}"
        for quantity, title in quantities.items()
        for name, value in last[last["quantity"] == quantity][["optimizer", "value"]].itertuples(index=False)
    )
    return Figure(
        "costs",
        "What a step costs" + (", against the size of the model" if several else ""),
        "Both axes are logarithmic. Hollow points are planned, not measured."
        + (f" Without state, and so not drawn there: {', '.join(stateless)}." if stateless else "")
        if several
        else "Medians; the optimizers took turns.",
        f"Costs with {number(table['parameters'].min())} to {number(table['parameters'].max())} parameters; "
        f"at the largest: {each}.",
        panels,
        table,
        columns=2 if several else 3,
    )


def series(section: Section, draw: Draw) -> list[Figure]:
    """Draw further measurements, named `quantity/tensor`: a figure per quantity, a panel per tensor.

    With more than twelve tensors there is a panel per optimizer instead, with a line per tensor.
    """
    measured = [record for record in section.records if record.series]
    rows = [
        (*name.partition("/")[::2], record.optimizer, step, value)
        for record in [r for r in measured if r.phase == "tuned"] or measured
        for name, points in record.series.items()
        for step, value in points
    ]
    by = ["quantity", "tensor", "optimizer", "step"]
    table = finite(pd.DataFrame(rows, columns=[*by, "value"]))
    made = []
    for quantity, means in table.groupby(by, as_index=False)["value"].mean().groupby("quantity"):
        low, high = means["value"].min(), means["value"].max()
        wide, many = low > 0 and high > 30 * low, means["tensor"].nunique() > 12
        scale = alt.Scale(domain=[low, high], padding=6, **({"type": "log"} if wide else {"zero": False}))
        title = "number" if quantity == "singular values" else "steps"
        x, y = alt.X("step:Q", title=title).scale(nice=False), alt.Y("value:Q", title=None, scale=scale)
        tip = ("optimizer:N", "tensor:N", "step:Q", "value:Q")
        panels = []
        for name, own in means.groupby("optimizer" if many else "tensor"):
            thin = alt.Chart(own).mark_line(strokeWidth=1).encode(x=x, y=y, detail="tensor:N")
            thin = thin.encode(color=draw.color(), opacity=opacity(0.7), tooltip=[*tip])
            drawn = [thin] if many else draw.lines(own, x, y, *tip)
            panels.append(panel(drawn, 190, str(name or quantity), optimizer=str(name) if many else ""))
        spans = means.groupby("optimizer")["value"].agg(["min", "max"]).itertuples()
        each = "; ".join(f"{name} from {number(least)} to {number(most)}" for name, least, most in spans)
        made.append(
            Figure(
                "series-" + "".join(c if c.isalnum() else "-" for c in str(quantity)),
                str(quantity).replace("_", " ").capitalize(),
                "Means over the seeds; all panels share the vertical axis"
                + (", a logarithmic one." if wide else "."),
                f"{quantity} over the steps: {each}.",
                panels,
                means,
                columns=3,
            )
        )
    return made


def _label_places(means: pd.DataFrame, ends: tuple[float, float]) -> list[float]:
    """Return heights at which the labels of nearby points do not overlap, even on a phone."""
    gap = (ends[1] - ends[0]) * 16 / _HEIGHT
    low, high = ends[0] + gap / 2, ends[1] - 1.5 * gap  # the text stands above this height
    across = means["bytes"] ** 0.5
    near = 0.35 * max(1.0, across.max())
    placed: list[tuple[float, float]] = []
    shifts = sorted(range(-len(means), len(means) + 1), key=abs)
    for x, y in zip(across, means["at"].clip(low, high), strict=True):
        taken = [height for at, height in placed if abs(x - at) <= near]
        places = (y + shift * gap for shift in shifts if low <= y + shift * gap <= high)
        free = (p for p in places if all(abs(p - height) >= 0.99 * gap for height in taken))
        placed.append((x, next(free, y)))
    return [height for _, height in placed]
