"""What all charts share: figures of Vega-Lite panels, the channels of an optimizer, and ranges.

No chart names a colour: those come from the theme's `config`. Every chart has a parameter `focus`, an
optimizer's name, which dims all others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from PIL import Image

from .merge import Section
from .table import number
from .theme import Mode, Style, config

Spec = dict[str, Any]
Tip = str | alt.Tooltip


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


def chart(figure: Figure, styles: Mapping[str, Style], mode: Mode, width: int = 760) -> Spec:
    """Return a figure as one Vega-Lite specification in a theme, `width` pixels wide."""
    inner = {"width": width // figure.columns - 70}
    outer = ("params", "usermeta", "datasets")
    return {
        "$schema": alt.SCHEMA_URL,
        "title": {"text": figure.title, "fontSize": 16},
        "params": [{"name": "focus", "value": ""}],
        "columns": figure.columns,
        "concat": [{k: v for k, v in panel.items() if k not in outer} | inner for panel in figure.panels],
        "config": config(styles, mode),
        "datasets": {name: rows for panel in figure.panels for name, rows in panel["datasets"].items()},
    }


def picture(spec: Spec, suffix: Literal["png", "svg"]) -> bytes:
    """Return a `chart` as PNG or SVG."""
    if suffix == "svg":
        return vl_convert.vegalite_to_svg(spec).encode()
    drawn = Image.open(BytesIO(vl_convert.vegalite_to_png(spec, scale=2))).convert("RGB")
    small = BytesIO()
    drawn.quantize(128).save(small, "png", optimize=True)  # a fifth of the size, for pictures kept in git
    return small.getvalue()


class Draw:
    """The channels by which an optimizer is known: colour, shape and dash."""

    def __init__(self, styles: Mapping[str, Style]) -> None:
        self._styles = styles

    def color(self, table: pd.DataFrame | None = None) -> Any:
        """The optimizer's colour, with a legend of those in the table."""
        return self._channel(alt.Color, table)

    def shape(self, table: pd.DataFrame | None = None) -> Any:
        """The optimizer's shape, with a legend of those in the table."""
        return self._channel(alt.Shape, table, range=[style.shape for style in self._styles.values()])

    def dash(self) -> Any:
        """The optimizer's dashes."""
        return self._channel(alt.StrokeDash, None, range=[[*style.dash] for style in self._styles.values()])

    def _channel(self, kind: Any, table: pd.DataFrame | None, **scale: Any) -> Any:
        channel = kind("optimizer:N").scale(domain=[*self._styles], **scale)
        if table is None:
            return channel.legend(None)
        present = set(table["optimizer"])
        return channel.legend(title=None, values=[name for name in self._styles if name in present])

    def points(self, table: pd.DataFrame, size: int, *tip: Tip, at: pd.DataFrame | None = None) -> Any:
        """Draw a point per row of `at`, by default of the table, which determines the legend."""
        points = alt.Chart(table if at is None else at).mark_point(size=size)
        color, shape = self.color(table), self.shape(table)
        return points.encode(color=color, shape=shape, opacity=opacity(1), tooltip=[*tip])

    def lines(self, table: pd.DataFrame, x: alt.X, y: alt.Y, *tip: Tip) -> list[alt.Chart]:
        """Draw a thin line per seed and the means on top; without seeds, the rows are the means."""
        points = finite(table)
        color, shape = self.color(points), self.shape(points)
        base = alt.Chart(over_seeds(table) if "seed" in table else points).encode(x=x, y=y, color=color)
        thick = base.mark_line(strokeWidth=2.2, clip=True).encode(strokeDash=self.dash(), opacity=opacity(1))
        marks = base.mark_point(size=50, clip=True).encode(shape=shape, opacity=opacity(1), tooltip=[*tip])
        if "seed" not in table:
            return [thick, marks]
        thin = alt.Chart(points).mark_line(strokeWidth=1, clip=True).encode(x=x, y=y, color=color)
        thin = thin.encode(detail="seed:N", opacity=opacity(0.35), tooltip=[*tip, "seed:Q"])
        return [thin, thick, marks]

    def outside(self, table: pd.DataFrame, x: alt.X, y: alt.Y, lower_is_better: bool) -> list[alt.Chart]:
        """Draw arrows at the range's end for values beyond it, with the values as text."""
        if table.empty:
            return []
        name = str(x["shorthand"]).removesuffix(":Q")
        ends = table.groupby(["optimizer", name, "at"], as_index=False)["value"].agg(["min", "max"])
        pairs = zip(ends["min"], ends["max"], strict=True)
        ends["text"] = ["–".join(dict.fromkeys((number(a), number(b)))) for a, b in pairs]
        arrow, below = ("triangle-up", 14) if lower_is_better else ("triangle-down", -14)
        arrows = alt.Chart(table).mark_point(shape=arrow, size=80)
        words = alt.Chart(ends).mark_text(dy=below, fontSize=11)
        tip = ["optimizer:N", f"{name}:Q", "value:Q"]
        return [
            arrows.encode(x=x, y=y, opacity=opacity(1), tooltip=tip, color=self.color()),
            words.encode(x=x, y=y, opacity=opacity(1), text="text:N"),
        ]


def panel(
    charts: Sequence[alt.Chart], height: int, *title: str, zoom: bool = False, optimizer: str = ""
) -> Spec:
    """Return charts on top of each other, with title and subtitle; they may show one `optimizer` alone."""
    # Vega warns of those without data.
    chart = alt.LayerChart(layer=[each for each in charts if len(each.data)])
    if zoom:
        moved = "[pointerdown[event.shiftKey], window:pointerup] > window:pointermove!"
        zoomed = alt.selection_interval(bind="scales", translate=moved, zoom="wheel![event.shiftKey]")
        chart = chart.add_params(zoomed)
    spec: Spec = chart.add_params(alt.param(name="focus", value="")).to_dict(validate=False)
    del spec["$schema"], spec["config"]
    spec |= {"height": height, "usermeta": {"optimizer": optimizer}}
    return spec | ({"title": {"text": title[0], "subtitle": [*title[1:]]}} if title else {})


def within(field: str, title: str | None, ends: tuple[float, float]) -> alt.Y:
    """Return a vertical axis over exactly this range."""
    return alt.Y(field, title=title).scale(domain=[*ends], nice=False, zero=False)


def opacity(value: float) -> alt.OpacityValue:
    """Return this opacity, but almost none while another optimizer is singled out."""
    test = "focus == '' || datum.optimizer == focus"
    return alt.OpacityValue(0.07, condition={"test": test, "value": value})


def drawn_range(values: Any, lower_is_better: bool) -> tuple[float, float]:
    """Return the range to draw: all values but those much worse than the median, with a margin.

    Example:
        >>> low, high = drawn_range([2.0, 2.1, 2.2, 900.0], True)
        >>> round(low, 3), round(high, 3)
        (1.984, 2.216)
    """
    sign = 1 if lower_is_better else -1
    scores = np.sort(sign * np.asarray([v for v in values if math.isfinite(v)], dtype=float))
    if not len(scores):
        return 0.0, 1.0
    best = scores[0]
    reach = 6 * (np.median(scores) - best) or math.inf
    worst = scores[scores <= best + reach][-1]
    margin = 0.08 * (worst - best) or 0.02 * abs(best) or 1.0
    low, high = sorted((sign * (best - margin), sign * (worst + margin)))
    return float(low), float(high)


def finite(points: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with a finite `value`."""
    return points[np.isfinite(points["value"].astype(float))].copy()


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean at each step over the seeds that did not diverge."""
    trained = table[table["finished"].astype(bool)].filter(["optimizer", "step", "seconds", "value"])
    return finite(trained.groupby(["optimizer", "step"], as_index=False).mean())


def name_metric(section: Section, split: str) -> str:
    """Return the primary metric's name and unit for an axis."""
    metric = section.experiment.metric
    return f"{split} {metric.name}" + (f" ({metric.unit})" if metric.unit else "")
