"""The report: plots as PNG files, and a self-contained HTML page."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

import steepest

from . import formatting
from .plan import Plan
from .plots import PLOTS, Plot
from .ranking import BASELINE, baseline, rank, untrained_metric
from .records import Record
from .run_dir import RunDir
from .theme import DARK, LIGHT, series_style


@dataclass(frozen=True)
class EmbeddedPlot:
    """A plot in the page: data URIs for light and dark backgrounds."""

    title: str
    caption: str
    light: str
    dark: str


def write(run_dir: RunDir, plan: Plan, records: Sequence[Record]) -> Path:
    """Draw the plots, write the page and return its path.

    Args:
        run_dir: The output directory. Each plot is also saved as NAME.png and NAME-dark.png.
        plan: The race's plan.
        records: The race's records. The race may be unfinished, and all trials may have diverged.
    """
    plots = [_embed(plot, run_dir.path, plan, records) for plot in PLOTS]
    run_dir.report.write_text(_page(plan, records, plots), encoding="utf-8")
    return run_dir.report


def _embed(plot: Plot, directory: Path, plan: Plan, records: Sequence[Record]) -> EmbeddedPlot:
    uris = {}
    for theme, suffix in ((LIGHT, ""), (DARK, "-dark")):
        path = directory / f"{plot.name}{suffix}.png"
        plot.draw(plan, records, theme).savefig(path)
        uris[theme.mode] = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return EmbeddedPlot(plot.title, plot.caption, uris["light"], uris["dark"])


def _page(plan: Plan, records: Sequence[Record], plots: Sequence[EmbeddedPlot]) -> str:
    environment = Environment(
        loader=PackageLoader("steepest.lab"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    indices = {label: index for index, label in enumerate(plan.labels)}
    return environment.get_template("report.html.j2").render(
        plan=plan,
        request=plan.request,
        rows=rank(plan, records),
        baseline=baseline(plan),
        has_target=BASELINE in plan.labels,
        scale=formatting.metric_scale(plan, records),
        untrained=untrained_metric(records),
        conditions=formatting.conditions(plan, records),
        machines=formatting.machines(records),
        plots=plots,
        formatting=formatting,
        light={label: series_style(LIGHT, index).color for label, index in indices.items()},
        dark={label: series_style(DARK, index).color for label, index in indices.items()},
        hyper={label: json.dumps(values) for label, values in plan.request.optimizers.items()},
        version=steepest.__version__,
    )
