"""The ranking and the page in Python."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from steepest.lab import LabError, ranking, write_report
from steepest.lab.records import write_records

from ..conftest import make_experiment, make_record

TEST = {"adamw": (2.0, 2.1, 2.3), "lion": (1.0, 1.2, 1.1)}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_experiment([*TEST]).save(tmp_path)
    records = [
        make_record(name, value, phase="tuned", seed=seed)
        for name, values in TEST.items()
        for seed, value in enumerate(values, 1)
    ]
    write_records(tmp_path, records)
    return tmp_path


def test_the_best_comes_first_with_its_mean_and_deviation(directory: Path) -> None:
    rows = ranking(str(directory))
    assert [row.optimizer for row in rows] == ["lion", "adamw"]
    for row in rows:
        assert row.test.mean == pytest.approx(statistics.mean(TEST[row.optimizer]))
        assert row.test.std == pytest.approx(statistics.stdev(TEST[row.optimizer]))


def test_the_page_lies_in_the_first_directory_or_where_it_is_wanted(directory: Path, tmp_path: Path) -> None:
    assert write_report(str(directory)) == directory / "report.html"
    assert "lion" in (directory / "report.html").read_text(encoding="utf-8")
    out = tmp_path / "pages" / "mine.html"
    assert write_report(directory, out=out) == out
    assert out.exists()


def test_without_an_experiment_there_is_neither(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="at least one directory"):
        write_report()
    for call in (ranking, write_report):
        with pytest.raises(LabError, match="holds no experiment"):
            call(tmp_path)
