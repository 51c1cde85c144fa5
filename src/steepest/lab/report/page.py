"""The report: one page that needs no network, with everything inlined."""

from __future__ import annotations

import base64
import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

import steepest

from ..errors import LabError
from ..files import page_path, parse_path, replace_file
from .charts import figures
from .draw import Figure
from .merge import load
from .table import columns, verdict
from .theme import FONT, MODES, PAGE, config, styles


def write_report(*directories: str | Path, out: str | Path | None = None) -> Path:
    """Write one page about the experiments in `directories`, finished or not, and return its path.

    Args:
        directories: The experiments' directories.
        out: The page's path, by default `report.html` in the first directory.

    Raises:
        LabError: there is no directory, one holds no experiment, or another program wrote `report.html`.
    """
    if not directories:
        raise LabError("a report needs at least one directory of an experiment")
    sections = load(directories)
    out = page_path(directories[0]) if out is None else parse_path(out)
    style = styles(name for section in sections for name in section.names)
    shown = [(f"s{index}", section, figures(section, style)) for index, section in enumerate(sections)]
    payload = {
        "configs": {mode: config(style, mode) for mode in MODES},
        "panels": {
            f"{id}-{figure.key}-{index}": panel
            for id, _, drawn in shown
            for figure in drawn
            for index, panel in enumerate(figure.panels)
        },
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template("page.html.j2").render(
        sections=sections,
        shown=shown,
        columns=columns,
        verdict=verdict,
        csv=_csv,
        styles=style,
        page=PAGE,
        font=Markup(FONT),
        # In a script, only "<" could end the element early.
        payload=Markup(json.dumps(_short(payload), separators=(",", ":")).replace("<", "\\u003c")),
        vega=_vega(),
        version=steepest.__version__,
    )
    replace_file(out, html)
    return out


def _csv(figure: Figure) -> str:
    text = figure.data.to_csv(index=False, float_format="%.7g")
    return "data:text/csv;base64," + base64.b64encode(text.encode()).decode()


@cache
def _vega() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script, compressed to a third and in base64."""
    return base64.b64encode(
        gzip.compress(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").encode(), 9, mtime=0)
    ).decode()


def _short(payload: object) -> Any:
    """Round numbers to seven digits, make NaN null, and drop legends, as the page has its own."""
    return json.loads(
        json.dumps(payload),
        parse_float=lambda text: float(f"{float(text):.7g}"),
        parse_constant=lambda text: None,
        object_hook=lambda value: {**value, "legend": None} if "legend" in value else value,
    )
