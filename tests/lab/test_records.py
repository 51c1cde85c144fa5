from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from steepest.lab import LabError
from steepest.lab.records import Record, RecordFile

from .conftest import make_record


@pytest.fixture
def file(tmp_path: Path) -> RecordFile:
    return RecordFile(tmp_path / "records.jsonl")


def test_records_are_read_back_as_they_were_written(file: RecordFile) -> None:
    records = [make_record(metric=0.1 + 0.2), make_record("b", 1 / 3, number=1)]
    for record in records:
        file.append(record)
    assert file.read() == records


def test_a_diverged_record_survives_a_round_trip_through_strict_json(file: RecordFile) -> None:
    file.append(make_record(metric=math.nan))
    data = json.loads(file.path.read_text(), parse_constant=pytest.fail)
    assert data["metric"] is None
    (record,) = file.read()
    assert math.isnan(record.metric)
    assert math.isnan(record.curve[-1][2])
    assert not record.finite


def test_a_missing_file_has_no_records(file: RecordFile) -> None:
    assert file.read() == []


@pytest.mark.parametrize("keep", [1, 10, -2, -1])
def test_an_incomplete_last_line_is_ignored_and_overwritten(file: RecordFile, keep: int) -> None:
    first, second, third = make_record(), make_record("b"), make_record("c")
    file.append(first)
    whole = file.path.read_bytes()
    file.append(second)
    incomplete = file.path.read_bytes()[len(whole) : keep if keep < 0 else len(whole) + keep]
    file.path.write_bytes(whole + incomplete)
    assert file.read() == [first]
    file.append(third)
    assert file.read() == [first, third]


@pytest.mark.parametrize("line", ["{}", "[]", "not json", '{"optimizer": "a"}', "\xff"])
def test_an_invalid_line_in_the_middle_is_an_error(file: RecordFile, line: str) -> None:
    good = make_record().to_json()
    file.path.write_bytes(f"{good}\n{line}\n{good}\n".encode("latin-1"))
    with pytest.raises(LabError, match=r"line 2 of .* is not a trial record"):
        file.read()


def test_only_an_ok_trial_with_a_finite_metric_is_finite() -> None:
    assert make_record().finite
    assert not replace(make_record(), status="diverged").finite
    assert not make_record(metric=math.inf).finite


def test_a_record_with_unknown_keys_is_rejected() -> None:
    data = json.loads(make_record().to_json())
    data["surprise"] = 1
    with pytest.raises(ValueError, match="not a trial record"):
        Record.from_json(json.dumps(data))
