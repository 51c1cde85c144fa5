"""The grid of SGD-SaI and the horizon study: what is searched, and with which data."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from steepest.lab import LabError, sweep
from steepest.lab.cli import study as commands
from steepest.lab.experiments.studies import horizon, sgd_sai_grid, ternary
from steepest.lab.training.optimizers import resolve_optimizers


def test_the_grids_cells_are_relative_to_each_optimizers_lr(tmp_path, plane, monkeypatch):
    models, sweeps = [], []
    monkeypatch.setattr(
        sgd_sai_grid, "images_task", lambda data, **sizes: models.append(sizes["model"]) or plane
    )
    monkeypatch.setattr(sgd_sai_grid, "sweep", lambda *asked, **options: sweeps.append((*asked, options)))
    plane.config["data"] = "a plane"
    sgd_sai_grid.run(tmp_path, optimizers=["sgd", "lion"], lrs=(0.1, 1), decays=(0, 1e-4))
    assert models == ["resnet18", "vit_s16"]
    assert [options["out"] for *_, options in sweeps] == [tmp_path / model for model in models]
    task, optimizers, space, options = sweeps[0]
    specs = resolve_optimizers(optimizers, task.make(0), options["settings"])
    assert [spec.label for spec in specs] == ["sgd", "lion"]
    for spec, lr in zip(specs, (0.1, 1e-4), strict=True):
        assert space(spec) == {
            "lr": pytest.approx([0.1 * lr, lr]),
            "weight_decay": [0, pytest.approx(1e-4 / lr)],
        }
    # Decoupled, a weight shrinks by lr·decay in a step: by 1e-4 at each optimizer's default.
    for spec in specs:
        model = nn.Linear(2, 1, bias=False)
        before = model.weight.detach().clone()
        optimizer = spec.build(model, {"weight_decay": space(spec)["weight_decay"][1]})
        model.weight.grad = torch.zeros(1, 2)
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), before * (1 - 1e-4), rtol=1e-6, atol=0)


def test_a_grid_needs_positive_factors(tmp_path):
    with pytest.raises(LabError, match="lrs must be positive"):
        sgd_sai_grid.run(tmp_path, lrs=[0.0, 1.0])


def test_longer_horizons_search_around_the_best_before(tmp_path, plane, monkeypatch):
    monkeypatch.setattr(horizon, "sweep", partial(sweep, timing_seconds=0))
    run = partial(
        horizon.run, tmp_path, task=plane, optimizers=["signgsd"], trials=2, longer_trials=1, seeds=1
    )
    results = run([6, 3])
    assert [result.experiment.steps for result in results] == [3, 6]
    whole, *narrow = (result.experiment.optimizers["signgsd"].space for result in results)
    assert (whole["lr"].low, whole["lr"].high) == pytest.approx((1e-4, 1.0))
    for space, before in zip(narrow, results, strict=False):
        (tuned,) = (record for record in before.records if record.phase == "tuned")
        for name, value in tuned.searched.items():
            assert (space[name].low, space[name].high) == pytest.approx((value / 4, value * 4))
    assert [result.experiment.trials for result in results] == [2, 1]
    assert "a factor of 4 of the best at 3 steps" in results[1].experiment.notes[0]
    lines = [(result.directory / "records.jsonl").read_text() for result in results]
    run([3, 6])
    assert [(result.directory / "records.jsonl").read_text() for result in results] == lines


def test_a_single_horizon_is_rejected(tmp_path, plane):
    with pytest.raises(LabError, match=r"at least two different numbers of steps, got \[5, 5\]"):
        horizon.run(tmp_path, [5, 5], task=plane)


@pytest.mark.parametrize(
    ("arguments", "module", "expected"),
    [
        (
            ["horizon", "--steps", "3,4", "--optimizers", "lion, muon"],
            horizon,
            {"optimizers": ["lion", "muon"]},
        ),
        (["sgd-sai-grid", "--models", "resnet18", "--seeds", "4"], sgd_sai_grid, {"seeds": 4}),
        (["ternary", "--tasks", "mlp", "--fresh"], ternary, {"fresh": True}),
    ],
)
def test_commands_pass_on_what_is_asked(arguments, module, expected, monkeypatch, tmp_path):
    called = {}
    arguments = [*arguments, "--out", str(tmp_path)]
    monkeypatch.setattr(module, "run", lambda *args, **options: called.update(options, args=args) or [])
    monkeypatch.setattr(commands, "finish", lambda *_: 0)
    result = CliRunner().invoke(commands.study, arguments, obj=[], catch_exceptions=False)
    assert result.exit_code == 0
    assert called.items() >= expected.items()
    assert called["args"][0] == tmp_path
    if module is horizon:
        assert called["args"][1] == [3, 4]


def test_horizons_are_numbers():
    with pytest.raises(LabError, match="bad --steps '5,many'"):
        commands.horizons("5,many")
