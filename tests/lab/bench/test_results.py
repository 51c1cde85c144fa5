from __future__ import annotations

import json
from pathlib import Path

import pytest

from steepest.lab.bench.results import Column, Record, Result, markdown
from steepest.lab.bench.runner import report
from steepest.lab.bench.terminal import table

from ..conftest import MACHINE

COLUMNS = (
    Column("label", "optimizer"),
    Column("step_ms", "step, ms", "ms"),
    Column("of_limit", "of the limit", "percent", wide=True),
    Column("state_bytes", "state", "bytes"),
    Column("reason", ""),
)
ROWS = [
    {"label": "axpy", "key": "axpy", "step_ms": 12.34, "of_limit": 1.0, "state_bytes": 0, "reason": ""},
    {"label": "lion", "key": "l", "step_ms": 0.5, "of_limit": 0.934, "state_bytes": 3 << 29, "more": [1]},
    {"label": "broken", "key": "b", "reason": "a | b"},
]


def record(**options: object) -> Record:
    machine = {**MACHINE, "packages": {"torch": "2"}}
    settings = {"dtype": "float32", "rounds": 9}
    return Record(machine, settings, [Result("steps", "Steps", COLUMNS, ROWS, ["a note"])], **options)  # type: ignore[arg-type]


def test_a_record_survives_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.json"
    record().save(path)
    assert Record.load(path) == record()
    read = json.loads(path.read_text())
    assert read["schema"] == 1
    assert set(read) == {"schema", "machine", "settings", "results", "interrupted"}
    assert read["results"][0]["rows"][1]["more"] == [1]


def test_a_record_of_another_version_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="99"):
        Record.load(path)


def test_the_markdown_has_a_cell_for_every_column_of_every_row() -> None:
    lines = markdown(record().results[0]).splitlines()
    assert lines[0] == "## Steps"
    assert lines[2:7] == [
        "| optimizer | step, ms | of the limit | state |  |",
        "| --- | ---: | ---: | ---: | --- |",
        "| axpy | 12.3 | 100 % | 0 B |  |",
        "| lion | 0.500 | 93 % | 1.5 GiB |  |",
        "| broken |  |  |  | a \\| b |",
    ]
    assert lines[-1] == "- a note"


def test_the_report_names_machine_and_settings() -> None:
    text = report(record())
    assert text.startswith("# an abacus, 1 of 1 cores, cpu\n")
    assert "float32, 9 rounds" in text
    assert "torch 2" in text
    assert "interrupted" not in text
    assert "interrupted" in report(record(interrupted=True))


def test_the_terminal_shows_the_same_cells() -> None:
    shown = table(record().results[0])
    cells = [list(column.cells) for column in shown.columns]
    assert cells[0] == ["axpy", "lion", "broken"]
    assert cells[2] == ["100 %", "93 %", ""]


def test_a_narrow_terminal_omits_columns_with_a_note() -> None:
    shown = table(record().results[0], width=80)
    assert [column.header for column in shown.columns] == ["optimizer", "step, ms", "state", ""]
    assert "RESULTS.md" in str(shown.caption)
    assert "RESULTS.md" not in str(table(record().results[0], width=150).caption)
