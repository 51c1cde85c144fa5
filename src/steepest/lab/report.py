"""The report: pictures as PNG, and one HTML page with everything embedded."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

import steepest

from . import wording
from .folder import Folder
from .plan import Plan
from .plots import PICTURES, Picture
from .records import Record
from .standings import REFERENCE, reference, standings, untrained
from .theme import DARK, LIGHT, mark


@dataclass(frozen=True)
class Embedded:
    """A picture as the page shows it: data URIs for light and dark ground."""

    title: str
    caption: str
    light: str
    dark: str


def write(folder: Folder, plan: Plan, records: Sequence[Record]) -> Path:
    """Draw the pictures and write the page; return the page's path.

    Args:
        folder: Where to. Pictures are written as NAME.png and NAME-dark.png.
        plan: The race's plan.
        records: Its records, which may be those of an unfinished race, or all diverged.
    """
    pictures = [_embed(picture, folder.path, plan, records) for picture in PICTURES]
    folder.page.write_text(_page(plan, records, pictures), encoding="utf-8")
    return folder.page


def _embed(picture: Picture, folder: Path, plan: Plan, records: Sequence[Record]) -> Embedded:
    uris = {}
    for theme, suffix in ((LIGHT, ""), (DARK, "-dark")):
        path = folder / f"{picture.name}{suffix}.png"
        picture.draw(plan, records, theme).savefig(path)
        uris[theme.mode] = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return Embedded(picture.title, picture.caption, uris["light"], uris["dark"])


def _page(plan: Plan, records: Sequence[Record], pictures: Sequence[Embedded]) -> str:
    environment = Environment(
        loader=PackageLoader("steepest.lab"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    marks = {label: index for index, label in enumerate(plan.labels)}
    return environment.get_template("report.html.j2").render(
        plan=plan,
        request=plan.request,
        rows=standings(plan, records),
        reference=reference(plan),
        catching_up=REFERENCE in plan.labels,
        like=wording.scale(plan, records),
        untrained=untrained(records),
        conditions=wording.conditions(plan, records),
        machines=wording.machines(records),
        pictures=pictures,
        wording=wording,
        light={label: mark(LIGHT, index).color for label, index in marks.items()},
        dark={label: mark(DARK, index).color for label, index in marks.items()},
        hyper={label: json.dumps(values) for label, values in plan.request.optimizers.items()},
        version=steepest.__version__,
    )
