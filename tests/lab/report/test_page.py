from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from steepest.lab import LabError
from steepest.lab.records import Experiment, OptimizerEntry, Record, write_records
from steepest.lab.report import load, section_table, write_report
from steepest.lab.report.charts import figures
from steepest.lab.report.markdown import write_markdown
from steepest.lab.report.merge import Section
from steepest.lab.report.table import columns, verdict
from steepest.lab.report.theme import styles

from ..conftest import make_experiment, make_record
from .conftest import ALL, make_section


class Page(HTMLParser):
    """The tags, references and words of a page, and the rows of its tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data.strip()

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("th", "td")

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def save(directory: Path, experiment: Experiment, records: list[Record]) -> Path:
    experiment.save(directory)
    write_records(directory, records)
    return directory


def page(directory: Path, experiment: Experiment, records: list[Record]) -> Page:
    out = write_report(save(directory, experiment, records))
    return Page(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Page:
    section = make_section(not_run={"soap": "it did not fit"}, notes=["A note of its own."])
    return page(tmp_path_factory.mktemp("finished"), section.experiment, section.records)


def test_the_page_asks_the_network_for_nothing_and_is_small(finished: Page) -> None:
    references = [a.get(key) or "" for _, a in finished.tags for key in ("src", "href", "srcset") if key in a]
    assert references
    assert all(reference.startswith(("data:text/csv", "#")) for reference in references)
    assert not {"link", "iframe", "img"} & {tag for tag, _ in finished.tags}
    assert sum(map(len, finished.words)) < 1_000_000


def test_the_table_shows_the_ranking_and_what_was_not_run(finished: Page) -> None:
    header, *rows = finished.rows
    table = {row[0]: dict(zip(header, row, strict=False)) for row in rows}
    assert [*table] == ["muon", "lion", "adamw", "signgsd", "soap"]
    muon = table["muon"]
    assert muon["test loss [nats]"] == "1.902\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.001"
    assert muon["untuned"].startswith("2.002")
    assert (muon["best lr"], muon["best weight decay"], muon["state B/param"]) == ("0.0003", "0", "4.4")
    assert (muon["step ms"], muon["× adamw"], muon["good region"]) == ("1.5", "1.00", "1 of 8 (12%)")
    assert table["adamw"]["steps to match adamw"] == "1,000"
    assert table["adamw"]["seconds to match adamw"] == "10"
    assert table["signgsd"]["seconds to match adamw"] == "–"
    assert table["soap"]["test loss [nats]"] == "not run: it did not fit"


def test_the_page_says_what_is_fair_and_how_it_was_made(finished: Page) -> None:
    for words in (
        "muon has the best loss on test data, 1.902 ± 0.001, significantly better than every other.",
        *(
            "Not run: soap: it did not fit",
            "A note of its own.",
            "Welch's t-test",
            "seed 0, and sees validation data only",
        ),
        *("steepest race --task made-up", "0123abc", "cpu an abacus", "it : lr=0.001, weight_decay=0"),
    ):
        assert words.replace(" ", "") in finished.text.replace("\N{NO-BREAK SPACE}", "").replace(" ", ""), (
            words
        )


def test_every_chart_has_its_data_as_csv_and_a_description_with_numbers(finished: Page) -> None:
    links = [a["href"] or "" for tag, a in finished.tags if tag == "a" and "download" in a]
    described = [a["aria-label"] or "" for _, a in finished.tags if a.get("role") == "img"]
    assert len(links) == len(described) == 5
    assert all(re.search(r"muon.*\d", words) for words in described)
    head, *lines = base64.b64decode(links[0].partition("base64,")[2]).decode().splitlines()
    assert head == "optimizer,bytes,value"
    assert "adamw,8,2.102" in lines
    assert len(lines) == 3 * len(ALL)


@pytest.mark.parametrize("tied", [True, False])
def test_no_row_of_a_tie_is_bold(tied: bool, tmp_path: Path) -> None:
    near = [2.0, 2.01, 2.02]
    records = [make_record("adamw", v, phase="tuned", seed=s) for s, v in enumerate(near, 1)]
    records += [
        make_record("lion", v + (0 if tied else 1), phase="tuned", seed=s) for s, v in enumerate(near, 1)
    ]
    shown = page(tmp_path, make_experiment(), records)
    assert any(a.get("class") == "wins" for tag, a in shown.tags if tag == "tr") != tied
    assert ("is not significantly better than lion" in shown.text) == tied
    assert sum(row[1].endswith("=") for row in shown.rows[1:]) == (2 if tied else 0)


def test_an_edge_is_marked_in_the_table() -> None:
    records = [make_record("adamw", v, lr=lr) for lr, v in [(1e-4, 3.0), (1e-3, 2.0), (1e-2, 1.0)]]
    cells = {c.header: c.cells for c in columns(Section(make_experiment(["adamw"]), records, []))}
    assert cells["best lr"] == ["0.01\N{NO-BREAK SPACE}↑"]


def test_names_and_texts_are_escaped(tmp_path: Path) -> None:
    name = "</script><b>&'mine'"
    shown = page(tmp_path, make_experiment([name], title="<i>x"), [make_record(name, 2.0, phase="tuned")])
    assert not {"b", "i"} & {tag for tag, _ in shown.tags}
    assert name in shown.text


@pytest.mark.parametrize("case", ["nothing", "search only", "all diverged"])
def test_an_unfinished_experiment_has_a_page(case: str, tmp_path: Path) -> None:
    records = {
        "nothing": [],
        "search only": [make_record("adamw", 2.0), make_record("lion", math.nan)],
        "all diverged": [
            make_record(n, math.nan, phase="tuned", seed=s) for n in ("adamw", "lion") for s in (1, 2)
        ],
    }[case]
    shown = page(tmp_path, make_experiment(), records)
    assert "No optimizer has a final result yet." in shown.text
    assert ("Not finished" in shown.text) == (case != "all diverged")
    assert any(row[1:2] == ["diverged"] for row in shown.rows) == (case == "all diverged")


def test_directories_of_one_experiment_become_one_section_and_others_their_own(tmp_path: Path) -> None:
    first = save(
        tmp_path / "a", make_experiment(["adamw", "lion"]), [make_record("lion", 2.0, phase="tuned")]
    )
    records = [make_record("muon", 1.0, phase="tuned"), make_record("lion", 3.0, phase="tuned")]
    more = make_experiment(["adamw", "muon"], command="another command", title="A made-up race")
    second = save(tmp_path / "b", more, records)
    other = save(tmp_path / "c", make_experiment(["lion"], steps=2000, title="Longer"), [])
    one, two = load([first, second, other])
    assert [*one.experiment.optimizers] == ["adamw", "muon", "lion"] or set(one.names) == {
        "adamw",
        "lion",
        "muon",
    }
    assert {(r.optimizer, r.test["loss"]) for r in one.records if r.test} == {("lion", 3.0), ("muon", 1.0)}
    assert len(one.commands) == 2
    assert two.experiment.title == "Longer"
    html = write_report(first, second, other, out=tmp_path / "all.html").read_text()
    assert html.count("<section") == 2
    with pytest.raises(LabError, match="holds no experiment"):
        load([tmp_path])
    with pytest.raises(LabError, match="at least one directory"):
        write_report(out=tmp_path / "no.html")


def test_experiments_of_different_lengths_share_a_chart_in_the_first_of_them(tmp_path: Path) -> None:
    for steps in (500, 1000):
        records = [make_record("adamw", 3.0 - steps / 1000, phase="tuned", steps=steps)]
        save(tmp_path / str(steps), make_experiment(["adamw"], steps=steps, trials=steps // 100), records)
    save(
        tmp_path / "other",
        make_experiment(["adamw"], task="another"),
        [make_record("adamw", 9.0, phase="tuned")],
    )
    sections = load([tmp_path / "500", tmp_path / "1000", tmp_path / "other"])
    drawn = [{f.key: f for f in figures(section, styles(["adamw"]))} for section in sections]
    assert ["horizon" in each for each in drawn] == [True, False, False]
    assert drawn[0]["horizon"].data[["steps", "value"]].values.tolist() == [[500, 2.5], [1000, 2.0]]


def test_the_verdict_names_the_one_of_a_tie_with_the_least_state() -> None:
    records = [
        make_record(
            name,
            2.0 + seed / 100 + (0.001 if name == "lion" else 0),
            phase="tuned",
            seed=seed,
            state_bytes=size,
        )
        for name, size in (("adamw", 800), ("lion", 400))
        for seed in (1, 2, 3)
    ]
    said = verdict(Section(make_experiment(), records, []))
    assert "Of these, lion keeps the least state: 4 bytes per parameter instead of 8." in said


def test_a_noisy_and_much_worse_mean_is_a_tie_but_no_recommendation() -> None:
    values = {"adamw": (2.0, 2.01, 2.02), "lion": (2.4, 2.5, 3.0)}
    records = [
        make_record(name, value, phase="tuned", seed=seed, state_bytes=800 if name == "adamw" else 400)
        for name, own in values.items()
        for seed, value in enumerate(own, start=1)
    ]
    said = verdict(Section(make_experiment(), records, []))
    assert "is not significantly better than lion" in said
    assert "least state" not in said


@pytest.mark.parametrize("width", [70, 100, 140])
def test_the_terminal_table_fits(width: int, tmp_path: Path) -> None:
    section = make_section(not_run={"soap": "it did not fit"})
    save(tmp_path, section.experiment, section.records)
    console = Console(file=io.StringIO(), width=width)
    console.print(section_table(load([tmp_path])[0], width))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
    assert "…" not in shown
    assert "1.902 ± 0.001" in shown.replace("\N{NO-BREAK SPACE}", " ")
    assert "B/param" in shown
    assert ("untuned" in shown) == (width == 140)


def test_the_winner_is_bold_on_the_terminal_and_a_tie_is_not() -> None:
    def styles_of(values: list[float]) -> list[str]:
        records = [make_record("adamw", 2 + s / 100, phase="tuned", seed=s) for s in (1, 2, 3)]
        records += [make_record("lion", v, phase="tuned", seed=s) for s, v in enumerate(values, 1)]
        return [str(row.style) for row in section_table(Section(make_experiment(), records, [])).rows]

    assert styles_of([2.01, 2.02, 2.04]) == ["", ""]
    assert styles_of([3.01, 3.02, 3.04]) == ["bold", ""]


def test_markdown_has_the_table_the_command_and_a_picture_in_both_themes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "steepest.lab.report.markdown.picture", lambda spec, suffix: spec["config"]["background"].encode()
    )
    section = make_section()
    save(tmp_path, section.experiment, section.records)
    text = write_markdown([tmp_path], tmp_path / "docs" / "x.md").read_text()
    assert "| **muon** | **1.902" in text
    assert "steepest race --task made-up" in text
    for mode, background in (("light", b"#ffffff"), ("dark", b"#0d1117")):
        assert f"x-frontier-{mode}.png" in text
        assert (tmp_path / "docs" / f"x-frontier-{mode}.png").read_bytes() == background


def test_the_command_writes_the_page_beside_the_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from steepest.lab.cli.app import run

    save(tmp_path, make_experiment(), [make_record("adamw", 2.0, phase="tuned")])
    assert run(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert "adamw" in capsys.readouterr().out


def test_a_grid_and_a_range_are_described(tmp_path: Path) -> None:
    entry = OptimizerEntry.model_validate(
        {
            "entry": "adamw",
            "hyperparameters": {"lr": 1e-3},
            "space": {"lr": {"low": 1e-5, "high": 0.1}, "beta": [0.9, 0.99]},
        }
    )
    experiment = make_experiment(["adamw"]).model_copy(update={"optimizers": {"adamw": entry}})
    assert "searched lr in 1e-05 … 0.1, beta in 0.9, 0.99".replace(" ", "") in page(
        tmp_path, experiment, []
    ).text.replace(" ", "")
