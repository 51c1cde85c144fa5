"""What makes a comparison fair: equal data, weights, trials, and no look at the test data."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest.lab import LabError, Metric, Record, Result, Task, sweep
from steepest.lab.experiments import storage
from steepest.lab.progress import Callback
from steepest.lab.tasks.task import Split
from steepest.lab.training.trial import Trial

GRID = {"lr": [3e-3, 3e-2, 0.3]}
ERROR = "squared error"


class Noisy(torch.optim.SGD):
    """Draws from torch's global generator, at the start and in each step."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, lr)
        torch.rand(())

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        torch.rand(3)
        super().step()


class Trials(Callback):
    """The trials that began."""

    def __init__(self) -> None:
        self.begun: list[Trial] = []

    def on_trial_start(self, trial: Trial) -> None:
        self.begun.append(trial)


def run_sweep(task: Task[Any], out: Path, optimizers: Any = ("adamw", "lion"), **options: Any) -> Result:
    options = {"space": GRID, "seeds": 2, "steps": 12, "timing_seconds": 0, **options}
    return sweep(task, optimizers, options.pop("space"), out=out, **options)


def of_phase(records: list[Record], phase: str, optimizer: str | None = None) -> list[Record]:
    return [r for r in records if r.phase == phase and optimizer in (None, r.optimizer)]


@dataclass
class Observed:
    result: Result
    trials: list[Trial]
    splits: dict[str, set[str]]
    drawn: dict[int, list[Tensor]]
    """By trial: initial weights, then batch and dropout's mask of every step."""


@pytest.fixture(scope="module")
def observed(plane: Task[Tensor], tmp_path_factory: pytest.TempPathFactory) -> Observed:
    trials = Trials()
    splits: dict[str, set[str]] = defaultdict(set)
    drawn: dict[int, list[Tensor]] = defaultdict(list)

    def make(seed: int) -> nn.Module:
        model = plane.make(seed)
        drawn[len(trials.begun)] = [nn.utils.parameters_to_vector(model.parameters()).detach().clone()]
        return model

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        drawn[len(trials.begun)] += [batch, model[1](torch.ones(8))]  # type: ignore[operator, index]
        return plane.loss(model, batch)

    def evaluate(model: nn.Module, split: Split) -> Any:
        splits[trials.begun[-1].phase].add(split)
        return plane.evaluate(model, split)

    task = replace(plane, make=make, loss=loss, evaluate=evaluate)
    optimizers = ["adamw", "simba", ("noisy", Noisy)]
    out = tmp_path_factory.mktemp("observed")
    result = run_sweep(
        task, out, optimizers, space={"lr": [3e-3, 3e-2]}, seeds=[3, 5], steps=6, callback=trials
    )
    del drawn[0]  # the model for which the optimizers were checked
    return Observed(result, trials.begun, splits, drawn)


def test_the_search_sees_validation_data_only(observed: Observed) -> None:
    splits = dict(observed.splits)
    assert splits.pop("search") == {"validation"}
    assert splits.keys() >= {"tuned", "default"}
    assert all(seen == {"validation", "test"} for seen in splits.values())
    assert all((r.test is None) == (r.phase == "search") for r in observed.result.records)


def test_weights_data_and_dropout_depend_on_the_seed_alone(observed: Observed) -> None:
    first: dict[int, list[Tensor]] = {}
    for trial, drawn in zip(observed.trials, observed.drawn.values(), strict=True):
        assert len(drawn) == 1 + 2 * trial.steps
        # A decayed trial is shorter.
        for ours, theirs in zip(first.setdefault(trial.seed, drawn), drawn, strict=False):
            assert torch.equal(ours, theirs), trial
    assert {trial.optimizer for trial in observed.trials} == {"adamw", "simba", "noisy"}
    assert first.keys() == {0, 3, 5}
    assert not torch.equal(first[3][0], first[5][0])
    assert not torch.equal(first[3][1], first[5][1])


def test_final_seeds_are_all_run_and_never_the_search_seed(observed: Observed) -> None:
    records = observed.result.records
    assert {r.seed for r in of_phase(records, "search")} == {0}
    for label, entry in observed.result.experiment.optimizers.items():
        assert len(of_phase(records, "search", label)) == 2
        for phase in ("tuned", "default"):
            assert sorted(r.seed for r in of_phase(records, phase, label)) == [3, 5]
        for record in of_phase(records, "default", label):
            assert record.searched == {}
            assert record.hyperparameters == entry.hyperparameters


@pytest.mark.parametrize("seeds", [[0, 1], [-1], 0, -2, []])
def test_the_search_seed_is_no_final_seed_and_there_is_one(
    seeds: Any, plane: Task[Tensor], tmp_path: Path
) -> None:
    with pytest.raises(LabError, match="seeds must be"):
        run_sweep(plane, tmp_path / "run", seeds=seeds)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lower", [True, False])
def test_a_grid_has_every_cell_once_and_the_best_by_validation_is_trained_again(
    lower: bool, plane: Task[Tensor], tmp_path: Path
) -> None:
    def evaluate(model: nn.Module, split: Split) -> dict[str, float]:
        value = plane.evaluate(model, split)[ERROR]
        # The test data would choose otherwise.
        return {"m": (1 if lower else -1) * (value if split == "validation" else -value)}

    task = replace(plane, evaluate=evaluate, metrics=(Metric(name="m", lower_is_better=lower),))
    space = {"lr": [1e-3, 1e-2, 0.1], "weight_decay": [0.0, 0.1]}
    records = run_sweep(task, tmp_path, "adamw", space=space, seeds=1).records
    cells = Counter((r.searched["lr"], r.searched["weight_decay"]) for r in of_phase(records, "search"))
    assert cells == dict.fromkeys([(lr, decay) for lr in space["lr"] for decay in space["weight_decay"]], 1)
    best = (min if lower else max)(of_phase(records, "search"), key=lambda r: r.validation[-1].metrics["m"])
    (tuned,) = of_phase(records, "tuned")
    assert tuned.searched == best.searched
    assert tuned.hyperparameters == {**best.hyperparameters, **best.searched}


def test_decayed_trials_end_where_the_mean_tuned_curve_reaches_the_baseline(
    plane: Task[Tensor], tmp_path: Path
) -> None:
    def space(spec: Any) -> Any:
        return {"lr": [3e-3 if spec.label == "adamw" else 0.1]}

    records = run_sweep(plane, tmp_path, space=space, steps=40).records
    tuned = {label: of_phase(records, "tuned", label) for label in ("adamw", "lion")}
    target = sum(r.validation[-1].metrics[ERROR] for r in tuned["adamw"]) / 2
    steps = [e.step for e in tuned["lion"][0].validation]
    mean = [
        (a.metrics[ERROR] + b.metrics[ERROR]) / 2
        for a, b in zip(*(r.validation for r in tuned["lion"]), strict=True)
    ]
    after = next(i for i, value in enumerate(mean) if value <= target)
    crossing = steps[after - 1] + (steps[after] - steps[after - 1]) * (mean[after - 1] - target) / (
        mean[after - 1] - mean[after]
    )
    assert 1 < crossing < 40
    decayed = of_phase(records, "decayed")
    assert [(r.optimizer, r.seed) for r in decayed] == [("lion", 1), ("lion", 2)]
    for record in decayed:
        assert crossing <= record.steps < crossing + 1
        assert record.last_step == record.training_loss[-1][0] == record.steps
        assert record.searched == tuned["lion"][0].searched


def test_diverging_trials_count_but_are_not_chosen(plane: Task[Tensor], tmp_path: Path) -> None:
    space = {"lr": [1e30, 0.01, 1e25]}
    records = run_sweep(plane, tmp_path, [("sgd", torch.optim.SGD)], space=space).records
    assert [r.status for r in of_phase(records, "search")] == ["diverged", "finished", "diverged"]
    assert {r.searched["lr"] for r in of_phase(records, "tuned")} == {0.01}


def test_an_optimizer_that_always_diverges_has_default_trials_only(
    plane: Task[Tensor], tmp_path: Path
) -> None:
    sgd = ("sgd", torch.optim.SGD)
    records = run_sweep(plane, tmp_path, [sgd, "adamw"], space={"lr": [1e25, 1e30]}, baseline="adamw").records
    assert Counter(r.phase for r in records if r.optimizer == "sgd") == {"search": 2, "default": 2}
    assert all(r.test is None for r in records if not r.finished)


def test_a_search_of_ranges_copes_with_divergence(plane: Task[Tensor], tmp_path: Path) -> None:
    sgd = [("sgd", torch.optim.SGD)]
    result = run_sweep(plane, tmp_path, sgd, space={"lr": (1e-8, 1e8)}, trials=6, seeds=1)
    search = of_phase(result.records, "search")
    assert len({r.searched["lr"] for r in search}) == 6
    assert search[0].searched["lr"] == pytest.approx(1.0)
    assert {r.status for r in search} == {"finished", "diverged"}
    assert len(of_phase(result.records, "tuned")) == 1


def climbing() -> Task[Tensor]:
    """The loss falls by the sum of the learning rates: the largest is best."""

    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

    return Task(
        name="climbing",
        make=lambda seed: Weight(),
        batches=lambda seed: [torch.zeros(1)],
        loss=lambda model, batch: -model.weight,
        evaluate=lambda model, split: {"m": -model.weight.item()},  # type: ignore[union-attr, operator]
        metrics=(Metric(name="m"),),
        steps=2,
        evaluations=1,
    )


def test_a_search_whose_best_point_is_at_the_edge_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Counter[str]()
    original = storage.Storage.claim

    def counted(self: storage.Storage, optimizer: str, phase: str, *rest: Any) -> Any:
        calls[phase] += 1
        assert calls[phase] < 50, "the search repeats itself"
        return original(self, optimizer, phase, *rest)

    monkeypatch.setattr(storage.Storage, "claim", counted)
    sgd = [("sgd", torch.optim.SGD)]
    result = run_sweep(climbing(), tmp_path, sgd, space={"lr": (1e-5, 0.1)}, trials=9, seeds=1, steps=2)
    assert len({r.searched["lr"] for r in of_phase(result.records, "search")}) == 9
    assert of_phase(result.records, "tuned")[0].searched == {"lr": pytest.approx(0.1)}


def test_grids_of_different_sizes_are_refused(plane: Task[Tensor], tmp_path: Path) -> None:
    def space(spec: Any) -> Any:
        return {"lr": [0.1] if spec.label == "lion" else [0.1, 0.2]}

    with pytest.raises(LabError, match="same number of trials"):
        run_sweep(plane, tmp_path, space=space)


def test_a_value_given_twice_is_one_cell(plane: Task[Tensor], tmp_path: Path) -> None:
    records = run_sweep(plane, tmp_path, "lion", space={"lr": [0.1, 0.1]}, seeds=1).records
    assert [r.phase for r in records] == ["search", "tuned", "default"]


def test_what_the_request_fixes_is_not_searched(plane: Task[Tensor], tmp_path: Path) -> None:
    settings = ["adamw.weight_decay=0.25"]
    result = run_sweep(plane, tmp_path, space=None, trials=2, seeds=1, settings=settings)
    assert {label: list(entry.space) for label, entry in result.experiment.optimizers.items()} == {
        "adamw": ["lr"],
        "lion": ["lr", "weight_decay"],
    }
    decays = {r.hyperparameters["weight_decay"] for r in result.records if r.optimizer == "adamw"}
    assert decays == {0.25}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_task_that_cannot_be_measured_is_an_error(
    value: float, plane: Task[Tensor], tmp_path: Path
) -> None:
    values: Iterator[float] = iter([value])
    task = replace(plane, evaluate=lambda model, split: {ERROR: next(values, 1.0)})
    with pytest.raises(LabError, match=r"squared error of the untrained model is (nan|inf)"):
        run_sweep(task, tmp_path, "lion")
