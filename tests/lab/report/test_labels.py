"""Labels that a terminal, a page, an image or Markdown would take for their own language."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from steepest.lab.cli import run
from steepest.lab.cli.options import make_console
from steepest.lab.printable import printable
from steepest.lab.progress.live import Live
from steepest.lab.progress.plain import Plain
from steepest.lab.records import Record, write_records
from steepest.lab.report import load, section_table, write_report
from steepest.lab.report.charts import figures
from steepest.lab.report.draw import chart, picture
from steepest.lab.report.markdown import write_markdown
from steepest.lab.report.page import _csv
from steepest.lab.report.theme import styles

from ..conftest import make_experiment, make_record
from .test_page import Page

LABELS = [
    *(
        "$\\frac{$",
        "[/x]",
        "[bold]b",
        "</script><script>alert(1)</script>",
        "a|b`c`",
        "*s* _u_ [l](http://x)",
    ),
    *("\x1b[31mred", "file\udcff", "two\nlines", "nul\0", "\u202eright", "\x9b31m", "{{ 7 * 7 }}"),
]


SHOWN = [printable(label) for label in LABELS]
ALL = "".join(LABELS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment in which every text holds all of them."""
    directory = tmp_path_factory.mktemp("labels")
    records: list[Record] = []
    for at, name in enumerate(LABELS):
        records += [make_record(name, 1 + at / 10, lr=lr) for lr in (1e-4, 1e-3, 1e-2)]
        gains = {f"gain/{name}": [(0, 1.0), (1, 2.0)]}
        common: dict[str, Any] = {"phase": "tuned", "series": gains}
        records += [make_record(name, 1 + at / 10 + seed / 100, seed=seed, **common) for seed in (1, 2, 3)]
    texts: dict[str, Any] = {
        "title": f"a race of {ALL}",
        "task": ALL,
        "config": {ALL: [ALL]},
        "notes": [ALL],
        "command": ALL,
    }
    make_experiment(LABELS, **texts, not_run={f"not {ALL}": f"because of {ALL}"}).save(directory)
    write_records(directory, records)
    return directory


def unprintable(text: str) -> set[str]:
    return {c for c in text if not c.isprintable()} - {"\n", "\N{NO-BREAK SPACE}"}


@pytest.mark.parametrize("console", [make_console(), Console(width=120)])
def test_the_terminal_s_table(console: Console, directory: Path) -> None:
    (section,) = load([directory])
    with console.capture() as drawn:
        console.print(section_table(section, 120))
    assert not unprintable(drawn.get())
    lines = [line.strip() for line in drawn.get().splitlines()]
    for shown in SHOWN:  # long ones are folded
        assert any(line.startswith(shown[:20]) and "±" in line for line in lines)


def test_markdown(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steepest.lab.report.markdown.figures", lambda *arguments: [])
    written = write_markdown([directory], directory / "page.md").read_text(encoding="utf-8")
    assert not unprintable(written)
    text, fence, _ = written.partition("```sh")
    assert fence
    assert not re.search(r"<script|</script|\]\(|\*s\*|[$\\]|`| _u_", text.replace("**", ""))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(LABELS) + 1
    assert len({line.count("|") for line in rows}) == 1
    # What a reader sees once the entities are resolved.
    names = [line.split("|")[1].strip().removeprefix("**").removesuffix("**") for line in rows]
    cells = {*map(html.unescape, names)}
    assert {*SHOWN} <= cells


def test_the_page(directory: Path) -> None:
    written = write_report(directory).read_text(encoding="utf-8")
    assert not unprintable(written)
    page = Page(written)
    assert {*SHOWN} <= {row[0] for row in page.rows if row}
    assert f"a race of {printable(ALL)}" in page.text
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 3
    payload = json.loads(written.split("<script>const page = ")[1].split(";</script>")[0])
    assert {panel["usermeta"]["optimizer"] for panel in payload["panels"].values()} >= {*SHOWN}


def test_charts_and_their_data(directory: Path) -> None:
    (section,) = load([directory])
    style = styles(section.names)
    for figure in figures(section, style):
        data = pd.read_csv(io.BytesIO(base64.b64decode(_csv(figure).partition(",")[2])))
        assert {*data["optimizer"]} == {*SHOWN}
        assert not unprintable(figure.alt)
        # The renderer would end the process at a character that XML does not know.
        assert picture(chart(figure, style, "light"), "svg").startswith(b"<svg")


@pytest.mark.parametrize("label", LABELS, ids=ascii)
def test_progress_shows_it(label: str) -> None:
    experiment, record = make_experiment([label], title=label), make_record(label)
    text = io.StringIO()
    live, plain = Live(Console(file=text, width=120, markup=False)), Plain(text)
    for callback in (live, plain):
        callback.on_start(experiment, [])
        callback.message(f"{printable(label)} joins")
        callback.on_trial_end(record)
    live.on_end()
    with live._console.capture() as drawn:
        live._console.print(live.draw())
    assert printable(label)[:20] in drawn.get()
    assert not unprintable(drawn.get() + text.getvalue())


def test_an_undecodable_path_names_an_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run\udcff"
    quick = ["--trials", "1", "--seeds", "1", "--steps", "2", "--workers", "1", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steepest.lab.experiments.sweep.training_costs", lambda *arguments: {})
        assert run(["race", "--task", "digits", "--optimizers", "[/x]=signgsd", *quick]) == 0
    assert f"report: {tmp_path}/run\\udcff/report.html" in capsys.readouterr().out
    (section,) = load([out])
    assert section.experiment.name == "run\\udcff"
    assert run(["report", str(tmp_path / "\x1b[31m")]) == 2
    assert not unprintable(capsys.readouterr().err)
