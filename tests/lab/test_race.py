from __future__ import annotations

import runpy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest.lab import LabError, RaceResult, Task, race
from steepest.lab.budget import MIN_STEPS
from steepest.lab.plan import StepTimes
from steepest.lab.progress import Callback
from steepest.lab.records import Record, TrialSpec

ENTRIES: list[Any] = ["lion", ("torch sgd", partial(torch.optim.SGD, momentum=0.9))]
SMALL: dict[str, Any] = {"trials": 3, "seeds": 3, "report": False}


def outcome(records: list[Record]) -> list[tuple[TrialSpec, list[float], list[float]]]:
    """The parts of the records that do not depend on the clock."""
    return [
        (
            record.trial,
            [value for *_, value in record.curve],
            [value for *_, value in record.validation],
        )
        for record in records
    ]


class StopAfter(Callback):
    """Interrupts the race during the trial after the given number of trials."""

    def __init__(self, trials: int) -> None:
        self.left = trials

    def on_trial_end(self, record: Record) -> None:
        self.left -= 1

    def on_step(self, step: int, loss: float) -> None:
        if self.left == 0 and step > 5:
            raise KeyboardInterrupt


def test_a_resumed_race_equals_an_uninterrupted_one(plane: Task[Tensor], tmp_path: Path) -> None:
    whole = race(plane, ENTRIES, steps=12, out=tmp_path / "whole", **SMALL)
    for trials in (0, 1, 4, 3):
        with pytest.raises(KeyboardInterrupt):
            race(plane, ENTRIES, steps=12, out=tmp_path / "torn", callback=StopAfter(trials), **SMALL)
        with (tmp_path / "torn" / "records.jsonl").open("a") as file:
            file.write('{"phase": "sea')
    resumed = race(plane, ENTRIES, steps=12, out=tmp_path / "torn", **SMALL)
    assert outcome(resumed.records) == outcome(whole.records)
    assert len(whole.records) == 2 * (3 + 2)


def test_a_finished_race_runs_no_more_trials(plane: Task[Tensor], tmp_path: Path) -> None:
    first = race(plane, ENTRIES, steps=12, out=tmp_path, **SMALL)

    def fail(model: nn.Module, batch: Tensor) -> Tensor:
        raise AssertionError

    again = race(replace(plane, loss=fail), ENTRIES, steps=12, out=tmp_path, **SMALL)
    assert again.records == first.records


def test_every_optimizer_learns_and_the_rows_are_sorted(plane: Task[Tensor], tmp_path: Path) -> None:
    result = race(plane, ENTRIES, steps=60, out=tmp_path, **SMALL)
    untrained = result.records[0].validation[0][2]
    assert all(row.metric < untrained for row in result.rows)
    assert [row.metric for row in result.rows] == sorted(row.metric for row in result.rows)
    assert {row.optimizer for row in result.rows} == {"lion", "torch sgd"}


def test_a_budget_is_converted_into_steps_once(plane: Task[Tensor], tmp_path: Path) -> None:
    first = race(plane, ["signgsd"], budget=2, out=tmp_path, **SMALL)
    assert first.plan.steps >= MIN_STEPS
    assert first.plan.limit == pytest.approx(2.6)
    again = race(plane, ["signgsd"], budget="2s", out=tmp_path, **SMALL)
    assert again.plan.steps == first.plan.steps
    assert again.plan.limit == first.plan.limit
    assert len(again.records) == len(first.records)


def test_another_plan_in_the_same_directory_is_rejected_and_fresh_starts_over(
    plane: Task[Tensor], tmp_path: Path
) -> None:
    race(plane, ["signgsd"], steps=5, out=tmp_path, **SMALL)
    with pytest.raises(LabError, match=r"steps \(5 there, 6 asked\); choose another directory or --fresh"):
        race(plane, ["signgsd"], steps=6, out=tmp_path, **SMALL)
    with pytest.raises(LabError, match="optimizers"):
        race(plane, ["lion"], steps=5, out=tmp_path, **SMALL)
    with pytest.raises(LabError, match="config"):
        race(replace(plane, config={"data": "other"}), ["signgsd"], steps=5, out=tmp_path, **SMALL)
    (tmp_path / "mine.txt").write_text("not a file of the race")
    fresh = race(plane, ["signgsd"], steps=6, out=tmp_path, fresh=True, **SMALL)
    assert {record.steps for record in fresh.records} == {6}
    assert (tmp_path / "mine.txt").exists()


def test_records_without_a_plan_are_rejected(plane: Task[Tensor], tmp_path: Path) -> None:
    race(plane, ["signgsd"], steps=5, out=tmp_path, **SMALL)
    (tmp_path / "plan.json").unlink()
    with pytest.raises(LabError, match="without a plan"):
        race(plane, ["signgsd"], steps=5, out=tmp_path, **SMALL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 5, "budget": "5m"}, "not both"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 5, "trials": 0}, "trials must be at least 1"),
        ({"steps": 5, "seeds": -1}, "seeds must be at least 1"),
        ({"budget": "soon"}, "bad budget 'soon'"),
        ({"budget": 0.01}, "too small for 5 trials"),
    ],
)
def test_impossible_requests_are_rejected(
    plane: Task[Tensor], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(LabError, match=words):
        race(plane, ["signgsd"], out=tmp_path / "new", **{**SMALL, **change})
    assert not (tmp_path / "new" / "records.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trials": "3"}, "trials must be a whole number, got '3'"),
        ({"steps": 20.5}, r"steps must be a whole number, got 20\.5"),
        ({"steps": 5, "seeds": None}, "seeds must be a whole number, got None"),
        ({"budget": [5]}, r"bad budget \[5\]"),
        ({"steps": 5, "optimizers": 3}, "optimizers must be a list"),
        ({"steps": 5, "optimizers": ("sgd", torch.optim.SGD)}, r"write \[\('sgd', …\)\]"),
        ({"steps": 5, "task": "text"}, r"must be a steepest\.lab\.Task, got a str"),
    ],
)
def test_requests_of_wrong_types_are_rejected_with_a_message(
    plane: Task[Tensor], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    request: dict[str, Any] = {"task": plane, "optimizers": "signgsd", "out": tmp_path, **SMALL, **change}
    with pytest.raises(LabError, match=words):
        race(request.pop("task"), request.pop("optimizers"), **request)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(2), r"config\['x'\] is a Tensor: give plain JSON values"),
        ({"deep": [1, {2}]}, r"config\['x'\]\['deep'\]\[1\] is a set"),
        ({3: 4}, r"config\['x'\] is a dict"),
        (float("nan"), r"config\['x'\] is nan"),
    ],
)
def test_non_json_values_in_config_are_rejected(
    plane: Task[Tensor], tmp_path: Path, value: object, words: str
) -> None:
    with pytest.raises(LabError, match=words):
        race(replace(plane, config={"x": value}), "signgsd", steps=5, out=tmp_path, **SMALL)


@pytest.mark.parametrize("entry", ["signgsd", torch.optim.SGD])
def test_a_single_optimizer_needs_no_list(entry: Any, plane: Task[Tensor], tmp_path: Path) -> None:
    (row,) = race(plane, entry, trials=1, seeds=1, steps=5, out=tmp_path, report=False).rows
    assert row.optimizer == getattr(entry, "__name__", entry)


def test_another_number_of_threads_is_another_plan(plane: Task[Tensor], tmp_path: Path) -> None:
    race(plane, ["signgsd"], steps=5, out=tmp_path, **SMALL)
    torch.set_num_threads(2)
    with pytest.raises(LabError, match=r"threads \(1 there, 2 asked\); choose another directory or --fresh"):
        race(plane, ["signgsd"], steps=5, out=tmp_path, **SMALL)


@pytest.mark.parametrize("quiet_first", [True, False])
def test_the_plan_keeps_the_less_noisy_times(
    quiet_first: bool, plane: Task[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = StepTimes(9, 10.0, {"signgsd": 1.0}, {"signgsd": (1.0, 1.0)}, 0.1)
    noisy = replace(quiet, gradient_ms=30.0)
    measured = iter([quiet, noisy] if quiet_first else [noisy, quiet])
    monkeypatch.setattr("steepest.lab.timing.measure", lambda *arguments: next(measured))
    result = race(plane, ["signgsd"], steps=5, out=tmp_path, **SMALL)
    assert next(measured, None) is None
    assert result.plan.times == quiet
    assert '"gradient_ms": 10.0' in (tmp_path / "plan.json").read_text()


def test_a_model_without_trainable_parameters_is_rejected(plane: Task[Tensor], tmp_path: Path) -> None:
    frozen = replace(plane, make=lambda seed: nn.Linear(4, 1).requires_grad_(False))
    with pytest.raises(LabError, match="no trainable parameters"):
        race(frozen, ["signgsd"], steps=5, out=tmp_path)


def test_the_callers_generator_does_not_change(plane: Task[Tensor], tmp_path: Path) -> None:
    before = torch.get_rng_state()
    race(plane, ["simba"], steps=5, out=tmp_path, **SMALL)
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture
def example() -> dict[str, Any]:
    path = Path(__file__).parents[2] / "examples" / "race_your_model.py"
    return runpy.run_path(str(path))


def test_the_example_runs_and_its_optimizers_learn(example: dict[str, Any], tmp_path: Path) -> None:
    result: RaceResult = example["main"](str(tmp_path))
    assert len(result.rows) == 3
    assert all(row.metric < 0.3 for row in result.rows)
    assert result.report == tmp_path / "report.html"
    assert (tmp_path / "report.html").exists()
