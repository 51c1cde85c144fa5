from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest

from steepest.lab.analysis.fairness import conditions, warnings
from steepest.lab.analysis.ranking import rank
from steepest.lab.records import Experiment, OptimizerEntry, Phase, Record

from ..conftest import make_experiment, make_record

FINAL: tuple[Phase, ...] = ("tuned", "default")


@dataclass
class Case:
    """A fair and finished experiment, to be spoilt."""

    experiment: Experiment = field(default_factory=make_experiment)
    records: list[Record] = field(
        default_factory=lambda: [
            *(
                make_record(n, v, lr=lr)
                for n in ("adamw", "lion")
                for lr, v in [(1e-4, 3), (1e-3, 2), (1e-2, 4)]
            ),
            *(
                make_record(n, 2.0, phase=p, seed=s)
                for n in ("adamw", "lion")
                for p in FINAL
                for s in (1, 2, 3)
            ),
        ]
    )

    def says(self) -> str:
        return " ".join(warnings(self.experiment, self.records, rank(self.experiment, self.records)))


def test_a_fair_and_finished_experiment_has_no_warning() -> None:
    assert Case().says() == ""


def test_a_final_seed_that_the_search_used_is_a_leak() -> None:
    case = Case()
    case.records.append(make_record("lion", 2.5, lr=1e-3, seed=2))
    case.records = [
        r for r in case.records if (r.optimizer, r.searched.get("lr"), r.seed) != ("lion", 1e-3, 0)
    ]
    assert "Not fair: the search used the final seed 2" in case.says()
    promised = Case(make_experiment(seeds=[0, 1, 2]), records=[])  # before anything ran
    assert "Not fair: the search used the final seed 0" in promised.says()


def test_test_metrics_in_the_search_are_a_leak() -> None:
    case = Case()
    case.records[0] = case.records[0].model_copy(update={"test": {"loss": 1.0}})
    assert "search trials were evaluated on test data (adamw)" in case.says()


def test_final_seeds_with_different_settings_are_not_fair() -> None:
    case = Case()
    case.records = [r for r in case.records if (r.optimizer, r.phase, r.seed) != ("lion", "tuned", 3)]
    case.records.append(make_record("lion", 1.0, phase="tuned", seed=3, lr=1e-2))
    assert "lion's final seeds have different hyper-parameters" in case.says()


def test_unequal_searches_are_not_fair() -> None:
    case = Case()
    del case.records[2]
    assert "different numbers of trials: adamw 2, lion 3" in case.says()


@pytest.mark.parametrize(("has", "said"), [({"lr": 1e-3, "weight_decay": 0.0}, True), ({"lr": 1e-3}, False)])
def test_what_one_searches_and_another_has_must_be_searched(has: dict[str, float], said: bool) -> None:
    case = Case()
    entries = {
        **case.experiment.optimizers,
        "lion": OptimizerEntry(
            entry="lion",
            hyperparameters={"lr": 1e-3, "weight_decay": 0.0},
            space={"lr": [1.0], "weight_decay": [0.1]},
        ),
        "adamw": OptimizerEntry(entry="adamw", hyperparameters=has, space={"lr": [1.0]}),
    }
    case.experiment = case.experiment.model_copy(update={"optimizers": entries})
    assert ("weight_decay was searched for other optimizers, but not for adamw" in case.says()) == said


@pytest.mark.parametrize(("steps", "said"), [(499, True), (500, False)])
def test_a_short_run_says_so(steps: int, said: bool) -> None:
    case = Case(make_experiment(steps=steps))
    case.records = [r.model_copy(update={"steps": steps}) for r in case.records]
    assert (f"Too short to mean anything: {steps} steps" in case.says()) == said


def test_missing_seeds_and_an_empty_experiment_are_unfinished() -> None:
    case = Case()
    case.records = [r for r in case.records if (r.optimizer, r.phase, r.seed) != ("lion", "default", 3)]
    assert "phase default still lacks these seeds: lion 3." in case.says()
    assert "no trial has ended yet" in Case(records=[]).says()


def test_divergence_edges_and_what_was_not_run_are_named() -> None:
    case = Case(make_experiment(not_run={"muon": "no matrices"}))
    case.records[0] = make_record("adamw", 1.0, lr=1e-4)
    case.records = [r for r in case.records if (r.optimizer, r.phase) != ("adamw", "tuned")]
    case.records += [
        make_record("adamw", v, phase="tuned", seed=s, lr=1e-4) for s, v in enumerate([1.0, math.nan, 1.0], 1)
    ]
    said = case.says()
    assert "adamw diverged with 1 of 3 final seeds" in said
    assert "adamw lr 0.0001 (lowest)" in said
    assert "lion lr" not in said
    assert "Not run: muon: no matrices" in said


def test_the_conditions_name_the_seeds_the_searched_values_and_the_decay_that_was_not() -> None:
    said = " ".join(conditions(make_experiment(notes=["A note."]), []))
    for words in (
        "3 settings of lr per optimizer, all with seed 0",
        "final seeds 1, 2, 3",
        "Weight decay was not searched: 0.0",
        "fewer diverged seeds ranks before one with a better mean",
    ):
        assert words in said
    assert said.endswith("A note.")
