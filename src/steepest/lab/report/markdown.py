"""A page of documentation from an experiment: the ranking, its pictures in both themes, and the command."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

from ..files import replace_file
from .charts import figures
from .draw import chart, picture
from .merge import Section, load
from .table import LEGEND, columns, verdict
from .theme import MODES, styles

# As entities, which every dialect knows. An underscore within a word and a single < are no markup.
_MARKUP = re.compile(r"[\\`*|$~]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<=\])\(|(?<!\w)_|_(?!\w)|^[#>+=-]")


def write_markdown(directories: Sequence[Path], out: Path) -> Path:
    """Write `out` and, beside it, a PNG per figure and theme; return its path.

    Raises:
        LabError: a directory holds no experiment.
    """
    sections = load(directories)
    style = styles(name for section in sections for name in section.names)
    lines: list[str] = []
    for index, section in enumerate(sections):
        title = f"{'##' if index else '#'} {_text(section.experiment.title)}"
        lines += [title, "", _text(verdict(section)), ""]
        lines += [*(f"> {_text(line)}" for line in section.warnings), ""]
        if section.rows or section.experiment.not_run:
            lines += [*_table(section), "", LEGEND, ""]
        for figure in figures(section, style):
            stem = f"{out.stem}-{f'{index}-' if index else ''}{figure.key}"
            for mode in MODES:
                drawn = picture(chart(figure, style, mode), "png")
                replace_file(out.parent / f"{stem}-{mode}.png", drawn)
            lines += [
                f'<picture><source media="(prefers-color-scheme: dark)" srcset="{stem}-dark.png">',
                f'<img alt="{html.escape(figure.alt)}" src="{stem}-light.png"></picture>',
                *("", _text(figure.caption), ""),
            ]
        lines += [f"- {_text(line)}" for line in section.conditions]
        lines += ["", "```sh", *section.commands, "```", ""]
        lines += [f"- {_text(line)}" for line in section.machines] + [""]
    replace_file(out, "\n".join(lines))
    return out


def _table(section: Section) -> list[str]:
    shown = columns(section)
    lines = ["| " + " | ".join(["optimizer", *(_text(column.header) for column in shown)]) + " |"]
    lines.append("| --- |" + " ---: |" * len(shown))
    for at, row in enumerate(section.rows):
        name, cells = _text(row.optimizer), [column.cells[at] for column in shown]
        if row.wins:
            name, cells[0] = f"**{name}**", f"**{cells[0]}**"
        lines.append("| " + " | ".join([name, *cells]) + " |")
    absent = section.experiment.not_run.items()
    rest = " |" * (len(shown) - 1)
    return [*lines, *(f"| {_text(name)} | not run: {_text(reason)} |{rest}" for name, reason in absent)]


def _text(text: str) -> str:
    """Return a text of which Markdown takes nothing for markup, mathematics, HTML or the end of a cell."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", text)
