from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from steepest.lab import Experiment, LabError
from steepest.lab.records import Evaluation, Metric, Range, Record, read_records, write_records

from .conftest import make_experiment, make_record


def test_records_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    records = [
        make_record(value=0.1 + 0.2),
        make_record("b", 1 / 3, phase="tuned", series={"gain": [(1, 0.5)]}),
    ]
    write_records(tmp_path / "new", records)
    assert read_records(tmp_path / "new") == records
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["records.jsonl"]


def test_nan_and_infinity_survive_strict_json(tmp_path: Path) -> None:
    points = [(1, 0.5, math.nan), (2, 1.0, -math.inf)]
    record = make_record(
        value=math.nan,
        training_loss=points,
        validation=[Evaluation(step=0, seconds=0.0, metrics={"loss": math.inf})],
    )
    write_records(tmp_path, [record])
    json.loads((tmp_path / "records.jsonl").read_text(), parse_constant=pytest.fail)
    (read,) = read_records(tmp_path)
    assert math.isnan(read.training_loss[0][2])
    assert read.training_loss[1] == (2, 1.0, -math.inf)
    assert read.validation[0].metrics == {"loss": math.inf}
    assert not read.finished
    assert math.isnan(read.validated("loss"))


def test_a_missing_file_has_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path) == []


@pytest.mark.parametrize("keep", [1, 10, -2, -1])
def test_an_incomplete_last_line_is_ignored(tmp_path: Path, keep: int) -> None:
    first, second = (make_record(name).model_dump_json() for name in "ab")
    (tmp_path / "records.jsonl").write_text(f"{first}\n" + f"{second}\n"[:keep])
    assert [record.optimizer for record in read_records(tmp_path)] == ["a"]


GOOD = make_record().model_dump_json()


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "[]",
        "not json",
        "\xff",
        "",
        GOOD.replace('"version":1', '"version":2'),
        GOOD[:-1] + ', "new": 1}',
    ],
)
def test_a_line_that_is_no_record_is_an_error_with_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "records.jsonl").write_bytes(f"{GOOD}\n{line}\n{GOOD}\n".encode("latin-1"))
    with pytest.raises(LabError, match=r"line 2 of .* is not a record: "):
        read_records(tmp_path)


def test_the_validated_metric_is_that_of_the_chosen_step() -> None:
    record = make_record(value=2.0, curve=[(0, 5.0), (500, 1.5)], chosen_step=500)
    assert record.validated("loss") == 1.5
    assert make_record(value=2.0).validated("loss") == 2.0


def test_an_experiment_is_read_back_as_it_was_saved(tmp_path: Path) -> None:
    experiment = make_experiment(space={"lr": Range(low=1e-4, high=1.0)}, config={"sizes": [1, 2]})
    experiment.save(tmp_path)
    assert Experiment.load(tmp_path) == experiment
    assert isinstance(Experiment.load(tmp_path).optimizers["lion"].space["lr"], Range)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 3}'])
def test_an_unreadable_experiment_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(LabError, match=r"holds no experiment: there is no experiment\.json"):
        Experiment.load(tmp_path)
    (tmp_path / "experiment.json").write_text(text)
    with pytest.raises(LabError, match="not an experiment that this version can read"):
        Experiment.load(tmp_path)


def test_lower_scores_are_better_for_every_metric() -> None:
    assert Metric(name="loss").score(2.0) < Metric(name="loss").score(3.0)
    up = Metric(name="accuracy", lower_is_better=False)
    assert up.score(3.0) < up.score(2.0)


def test_a_record_with_unknown_keys_is_rejected() -> None:
    with pytest.raises(ValueError, match="surprise"):
        Record.model_validate({**make_record().model_dump(), "surprise": 1})
