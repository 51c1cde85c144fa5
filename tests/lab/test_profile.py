from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest import model_shapes as shapes
from steepest.lab import LabError, cli
from steepest.lab.bench import costs as costs_module
from steepest.lab.experiments import growth as growth_module
from steepest.lab.experiments.growth import growth
from steepest.lab.experiments.local_gain import LOCAL_GAIN
from steepest.lab.experiments.observed import observe
from steepest.lab.experiments.spectra import SPECTRA
from steepest.lab.records import Experiment, Metric, read_records
from steepest.lab.tasks.task import Task
from steepest.lab.training.optimizers import resolve_optimizers
from steepest.lab.training.trial import Trial, run_trial
from steepest.lab.training.updates import observe_updates
from steepest.planning.shapes import model_of

STEPS = 12
SCALES = torch.tensor([1.0 + 3.0 * (step % 5) for step in range(STEPS)], dtype=torch.float64)
NAME = "0.weight"


def make_task(gradient: Tensor) -> Task[float]:
    """The gradient of the first layer is `gradient` times SCALES[t] in step t; the last layer has none."""
    rows, columns = gradient.shape

    def batches(seed: int) -> Iterator[float]:
        yield from SCALES.tolist()

    return Task(
        name="linear",
        make=lambda seed: nn.Sequential(nn.Linear(columns, rows, bias=False), nn.Linear(rows, 2, bias=False)),
        batches=batches,
        loss=lambda model, scale: scale * (gradient * model[0].weight).sum(),
        evaluate=lambda model, split: {"loss": 1.0},
        metrics=(Metric(name="loss"),),
        steps=STEPS,
        evaluations=1,
    )


@pytest.fixture
def gradient() -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(0)) + 0.5


def gain_of(entry: str, gradient: Tensor) -> Tensor:
    """Return the closed form of the gain in each step, in float64."""
    c = gradient.double()
    if "SGD" in entry or entry == "sgd":
        return torch.ones(STEPS, dtype=torch.float64)
    if entry == "sgd_sai":
        return torch.full((STEPS,), float(c.norm() / c.std()), dtype=torch.float64)
    # v̂ = A c² with the average A of the squared scales; Adam-mini has c²'s mean over a row for c².
    beta = 0.999
    steps = torch.arange(1, STEPS + 1)
    weights = (1 - beta) * beta ** (steps[:, None] - steps[None, :]).double()
    average = (weights.tril() @ SCALES.square()) / (1 - beta**steps)
    size = c.square().mean(1, keepdim=True).sqrt() if entry == "adam_mini" else c.abs()
    return float((c.square() / size).sum() / c.square().sum()) / average.sqrt()


def test_local_gains_are_those_of_the_closed_form(gradient: Tensor, tmp_path: Path) -> None:
    entries = ["sgd", "sgd_sai", "adamw", "adam_mini", "torch.optim:AdamW", "torch.optim:SGD"]
    result = observe(make_task(gradient), LOCAL_GAIN, entries, out=tmp_path, points=STEPS)
    records = {record.optimizer: record for record in read_records(tmp_path)}
    assert [*records] == entries
    for entry, record in records.items():
        assert {*record.series} == {f"local gain/{NAME}"}
        steps, gains = zip(*record.series[f"local gain/{NAME}"], strict=True)
        assert list(steps) == [*range(1, STEPS + 1)]
        found = torch.tensor(gains, dtype=torch.float64)
        torch.testing.assert_close(found, gain_of(entry, gradient), rtol=1e-4, atol=0.0, msg=entry)
        flat = float(found.max() / found.min()) < 1 + 1e-4
        assert flat == (entry in ("sgd", "sgd_sai", "torch.optim:SGD")), entry
        assert result.experiment.optimizers[entry].hyperparameters["weight_decay"] == 0


def test_gains_with_momentum_are_flat_too(gradient: Tensor, tmp_path: Path) -> None:
    observe(make_task(gradient), LOCAL_GAIN, "sgd", settings=["sgd.momentum=0.9"], out=tmp_path, points=STEPS)
    (record,) = read_records(tmp_path)
    gains = [value for _, value in record.series[f"local gain/{NAME}"]]
    assert gains == pytest.approx([1.0] * STEPS, rel=1e-6)


def test_measured_steps_are_evenly_spaced_and_train_as_others_do(plane: Task[Tensor]) -> None:
    (spec,) = resolve_optimizers("adamw", plane.make(0), ["adamw.weight_decay=0.0"])
    trial = Trial("adamw", "default", 1, {}, 40)
    steps: dict[str, list[int]] = {}

    def measure(series: Any, update: Any) -> None:
        steps.setdefault(update.name, []).append(update.step)

    observed = run_trial(plane, spec, trial, observe=observe_updates(measure, 40, 4))
    plain = run_trial(plane, spec, trial)
    assert steps["0.weight"] == [1, 10, 20, 30, 40]
    assert observed.training_loss[-1][2] == plain.training_loss[-1][2]
    assert observed.test == plain.test


def test_an_optimizer_whose_steps_depend_on_the_weights_is_measured_too(
    gradient: Tensor, tmp_path: Path
) -> None:
    settings = ["hyperball.radius=1.0"]
    observe(make_task(gradient), LOCAL_GAIN, "hyperball", settings=settings, out=tmp_path, points=2)
    (record,) = read_records(tmp_path)
    steps, gains = zip(*record.series[f"local gain/{NAME}"], strict=True)
    assert steps == (1, 6, 12)
    assert all(math.isfinite(gain) and gain for gain in gains)


def test_updates_of_muon_are_flat_and_those_of_sgd_have_the_gradients_rank(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    full = torch.randn(4, 5, generator=generator)
    thin = torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 6.0))

    def found(gradient: Tensor, optimizer: str, *settings: str) -> dict[str, list[tuple[int, float]]]:
        out = tmp_path / f"{optimizer}{gradient is thin}"
        observe(make_task(gradient), SPECTRA, optimizer, settings=settings, out=out, points=4)
        (record,) = read_records(out)
        return record.series

    flat = found(full, "muon", "muon.method=svd")
    assert [value for _, value in flat[f"stable rank/{NAME}"]] == pytest.approx([4.0] * 5, rel=1e-4)
    assert [value for _, value in flat[f"spectral entropy/{NAME}"]] == pytest.approx([1.0] * 5, rel=1e-4)
    places, values = zip(*flat[f"singular values/{NAME}"], strict=True)
    assert places == (1, 2, 3, 4)
    assert values == pytest.approx([1.0] * 4, rel=1e-4)
    one = found(thin, "sgd")
    assert [value for _, value in one[f"stable rank/{NAME}"]] == pytest.approx([1.0] * 5, rel=1e-6)
    assert [value for _, value in one[f"spectral entropy/{NAME}"]] == pytest.approx([0.0] * 5, abs=1e-6)
    # SGD's update is the gradient itself.
    spectrum = torch.linalg.svdvals(full)
    scaled = [value for _, value in found(full, "sgd")[f"singular values/{NAME}"]]
    assert scaled == pytest.approx((spectrum / spectrum[0]).tolist(), rel=1e-5)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Replace the sizes of GPT-2 by two small ones; return their numbers of parameters."""
    sizes = {
        "small": tuple(shapes._gpt2(16, 1, 32, 8)),
        "large": tuple(shapes._gpt2(32, 2, 32, 8)),
        "tiny": shapes.model_shapes("tiny").tensors,
    }
    monkeypatch.setattr(growth_module, "GROWTH_SIZES", {"small": "small", "large": "large"})
    monkeypatch.setattr(
        growth_module, "meta_model", lambda size: model_of((each.name, each.shape) for each in sizes[size])
    )
    return {size: sum(each.numel for each in sizes[size]) for size in ("small", "large")}


def test_growth_measures_what_it_may_and_plans_the_rest(toys: dict[str, int], tmp_path: Path) -> None:
    optimizers = ["sgd", "lion", "adamw", "torch.optim:AdamW", "torch.optim:Adagrad"]
    growth(optimizers, ["small", "large"], measured=["small"], rounds=1, out=tmp_path)
    experiment = Experiment.load(tmp_path)
    assert {*experiment.costs, *experiment.not_run} == {
        f"{name} @ {size}" for name, size in itertools.product(optimizers, toys)
    }
    assert {*experiment.not_run} == {"torch.optim:Adagrad @ large"}
    tensors = {"small": 4 + 12, "large": 4 + 24}
    for key, cost in experiment.costs.items():
        name, _, size = key.partition(" @ ")
        per_tensor = 4 * tensors[size]
        expected = {
            "sgd": 0,
            "lion": 4 * toys[size],
            "adamw": 8 * toys[size] + 2 * per_tensor,
            "torch.optim:AdamW": 8 * toys[size] + per_tensor,
            "torch.optim:Adagrad": 4 * toys[size] + per_tensor,
        }[name]
        assert cost.state_bytes - expected in ((0, 2 * per_tensor) if name == "sgd" else (0,)), key
        assert cost.parameters == toys[size]
        assert cost.planned == (size == "large") == (cost.optimizer_ms is None)
        # Nobody knows what torch's step would hold on the way.
        assert (cost.peak_bytes is None) == (cost.planned and name == "torch.optim:AdamW")
        assert cost.peak_bytes is None or cost.peak_bytes >= cost.state_bytes


def test_a_plan_has_the_measured_state(toys: dict[str, int], tmp_path: Path) -> None:
    names = growth_module.DEFAULT_OPTIMIZERS
    measured = growth(names, ["large"], measured=["large"], rounds=1, out=tmp_path).costs
    planned = growth(names, ["large"], measured=[], rounds=1, out=tmp_path).costs
    assert {key: cost.state_bytes for key, cost in measured.items()} == {
        key: cost.state_bytes for key, cost in planned.items()
    }


def test_without_memory_everything_is_planned(
    toys: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs_module, "available_bytes", lambda device: 1000)
    costs = growth("lion", ["small"], measured=["small"], out=tmp_path).costs
    assert costs["lion @ small"].planned


def test_bad_requests_are_refused(gradient: Tensor, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="unknown size '7b': choose 125m"):
        growth(sizes=["7b"], out=tmp_path)
    with pytest.raises(LabError, match="points must be at least 1"):
        observe(make_task(gradient), LOCAL_GAIN, points=0, out=tmp_path)


def test_the_command_runs_the_optimizers_that_it_was_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--optimizers", "lion,torch.optim:SGD", "--sizes", "125m", "--measured", "", "--workers", "1"]
    assert cli.run(["profile", "growth", *options, "--out", str(tmp_path)]) == 0
    experiment = Experiment.load(tmp_path / "growth")
    assert {*experiment.costs} == {"lion @ 125m"}
    assert {*experiment.not_run} == {"torch.optim:SGD @ 125m"}
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    assert cli.run(["profile", "gains"]) == 2
    assert "choose local-gain, spectra, growth or all" in capsys.readouterr().err
