from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor, nn

from steepest.lab import Experiment, LabError, Record, Task
from steepest.lab.experiments.race import (
    LEAST_TRIALS,
    MAX_TRIALS,
    MIN_TRIALS,
    fit_budget,
    parse_seconds,
    race,
)
from steepest.lab.progress import Callback
from steepest.lab.records import Cost
from steepest.lab.tasks.task import Split


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5m", 300),
        ("90s", 90),
        ("1h", 3600),
        ("1h30m", 5400),
        ("1.5M", 90),
        (" 2 m ", 120),
        ("45", 45),
        (7.5, 7.5),
    ],
)
def test_parses_durations(text: str | float, expected: float) -> None:
    assert parse_seconds(text) == expected


@pytest.mark.parametrize(
    "text", ["", "m", "5x", "five", "-5m", "-3", "0", "0m", "nan", "inf", "5m!", "1e400"]
)
def test_rejects_anything_else(text: str) -> None:
    with pytest.raises(LabError, match="bad budget"):
        parse_seconds(text)


def costs(**milliseconds: float) -> dict[str, Cost]:
    return {
        label: Cost(
            optimizer=label, model="m", parameters=1, state_bytes=0, gradient_ms=1.0, optimizer_ms=ms - 1
        )
        for label, ms in milliseconds.items()
    }


# A trial of 1000 steps takes as many seconds as a step takes milliseconds; with two seeds there are five
# final trials per optimizer.
THREE = costs(a=2, b=3, c=5)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (130.0, (8, ["a", "b", "c"])),  # (8 + 5) · 10
        (129.9, (16, ["a", "b"])),  # (20 + 5) · 5 would fit
        (149.9, (9, ["a", "b", "c"])),
        (210.0, (16, ["a", "b", "c"])),
        (1e9, (16, ["a", "b", "c"])),
        (65.0, (8, ["a", "b"])),
    ],
)
def test_as_many_optimizers_as_fit_run_in_their_order(
    seconds: float, expected: tuple[int, list[str]]
) -> None:
    assert (MIN_TRIALS, MAX_TRIALS) == (8, 16)
    assert fit_budget(THREE, 1000, 2, seconds, 60.0) == expected


@pytest.mark.parametrize(
    ("of", "steps", "fraction", "names"),
    [(THREE, 1000, 0.8, "a and b"), (THREE, 30_000, 1.6, "a and b"), (costs(a=500), 1000, 0.8, "a")],
)
def test_the_error_for_a_small_budget_names_a_sufficient_one(
    of: dict[str, Cost], steps: int, fraction: float, names: str
) -> None:
    with pytest.raises(LabError, match=f"too small for {names}: give at least ") as error:
        fit_budget(of, steps, 3, fraction * 0.5, 0.5)
    found = re.search("at least (.*?),", str(error.value))
    assert found is not None
    enough = parse_seconds(found[1].replace("min", "m"))
    trials, labels = fit_budget(of, steps, 3, fraction * enough, enough)
    assert trials >= LEAST_TRIALS
    assert len(labels) == min(2, len(of))
    with pytest.raises(LabError, match="too small"):
        fit_budget(of, steps, 3, fraction * enough / 1.3, enough)


def test_the_evaluations_of_a_trial_count(
    plane: Task[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prices = costs(signgsd=1.0, lion=1.0)
    monkeypatch.setattr("steepest.lab.experiments.sweep.training_costs", lambda task, specs, seconds: prices)

    def slowly(model: nn.Module, split: Split) -> dict[str, float]:
        time.sleep(0.01)
        return {"squared error": 1.0}

    # 10 steps take 10 ms, 5 evaluations 50 ms, or more on a busy machine; with one seed there are 2.5 final
    # trials. Without the evaluations, 1 s would do.
    slow = replace(plane, evaluate=slowly, evaluations=4)
    with pytest.raises(LabError, match=r"too small for signgsd and lion: give at least [2-9] s"):
        race(slow, [*prices], budget=0.5, seeds=1, steps=10, out=tmp_path)


def test_a_race_drops_the_last_optimizers_and_says_so(
    plane: Task[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prices = costs(signgsd=1.1, lion=1.2, adamw=50.0)
    monkeypatch.setattr("steepest.lab.experiments.sweep.training_costs", lambda task, specs, seconds: prices)
    monkeypatch.setattr("steepest.lab.experiments.race.evaluation_seconds", lambda task: 0.0)
    messages: list[str] = []

    class Listen(Callback):
        def message(self, text: str) -> None:
            messages.append(text)

        def on_start(self, experiment: Experiment, records: Sequence[Record]) -> None:
            raise KeyboardInterrupt

    def interrupted(optimizers: list[str]) -> Experiment:
        with pytest.raises(KeyboardInterrupt):
            race(plane, optimizers, budget=0.35, seeds=1, steps=10, out=tmp_path, callback=Listen())
        return Experiment.load(tmp_path)

    # 0.8 · 0.35 s are 12.2 trials of 10 steps of 1.1 + 1.2 ms.
    experiment = interrupted([*prices])
    assert list(experiment.optimizers) == ["signgsd", "lion"]
    assert experiment.trials == 9
    assert experiment.not_run == {"adamw": "it did not fit the budget of 0 s"}
    assert "2 optimizers fit the budget: signgsd, lion" in messages[-1]
    # A second call does not change the plan, nor does one with a further optimizer.
    assert interrupted([*prices]).not_run == experiment.not_run
    prices["sgd"] = prices["lion"]
    grown = interrupted([*prices])
    assert list(grown.optimizers) == ["signgsd", "lion", "sgd"]
    assert grown.not_run == experiment.not_run
    # Who asks for the dropped one by name gets it.
    asked = interrupted(["adamw"])
    assert list(asked.optimizers) == ["signgsd", "lion", "sgd", "adamw"]
    assert asked.not_run == {}
