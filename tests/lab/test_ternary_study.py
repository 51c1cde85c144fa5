"""The study of ternary training: methods against their definitions, weight statistics, a complete run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import steepest
from steepest.lab import LabError, sweep
from steepest.lab.experiments.studies import ternary
from steepest.lab.experiments.studies.ternary import study
from steepest.lab.experiments.studies.ternary.layers import (
    BopAdamW,
    BopLinear,
    LatentTernaryLinear,
    make_latent,
)
from steepest.lab.experiments.studies.ternary.weights import BYTES, FLIPS, ZEROS, observe_weights
from steepest.lab.models.digits import DigitConvNet, PatchConv, normed_mlp
from steepest.ternary import TernaryLinear


def test_the_latent_layer_rounds_by_the_mean_and_passes_the_gradient_through():
    torch.manual_seed(0)
    layer = LatentTernaryLinear(7, 5)
    x, pull = torch.randn(3, 7), torch.randn(3, 5)
    scale = layer.weight.detach().abs().sum() / 35
    expected = torch.tensor(
        [[max(-1, min(1, round(w / scale.item()))) for w in row] for row in layer.weight.tolist()]
    )
    torch.testing.assert_close(layer(x), x @ (expected * scale).t() + layer.bias)
    layer(x).backward(pull)
    torch.testing.assert_close(layer.weight.grad, pull.t() @ x)


def test_latent_layers_replace_the_same_layers_as_ternary_ones():
    model, other = normed_mlp(16), normed_mlp(16)
    weights = [model[1].weight, model[4].weight]
    made = make_latent(model)
    assert [layer.weight for layer in made] == weights
    names = [name for name, m in model.named_modules() if isinstance(m, LatentTernaryLinear)]
    assert names == list(steepest.ternary.ternarize(other).replaced)


def test_bop_flips_where_the_average_passes_the_threshold():
    layer = BopLinear(TernaryLinear(2, 2, bias=False))
    layer.weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    options = {"lr": 0.0, "gamma": 0.5, "threshold": 0.4, "total_steps": 100, "power": 1e-9}
    bop = BopAdamW([layer.scale], [layer], **options)
    gradient = torch.tensor([[3.0, -3.0], [3.0, 0.1]])
    unit = gradient / gradient.square().mean().sqrt()
    seen = []
    for _ in range(3):
        layer.weight.grad = gradient.clone()
        bop.step()
        seen.append(layer.weight.detach().clone().tolist())
    average = unit * (1 - 0.5**3)
    torch.testing.assert_close(bop.averages[0][1], average)
    # Weights move against the gradient, by one per step, within −1 and 1.
    assert seen == [[[0, 1], [-1, 0]], [[-1, 1], [-1, 0]], [[-1, 1], [-1, 0]]]
    bop.zero_grad()
    assert layer.weight.grad is None


def test_a_linear_layer_of_patches_equals_a_convolution():
    torch.manual_seed(0)
    conv = PatchConv(3, 5)
    images = torch.randn(2, 3, 8, 8)
    expected = nn.functional.conv2d(images, conv.linear.weight.view(5, 3, 3, 3), padding=1)
    torch.testing.assert_close(conv(images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("label", "changed", "expected"),
    [
        ("float32", {}, 12),
        ("latent float32", {}, 12),
        ("votes by sign", {"threshold": 1}, 1.25),
        ("votes by magnitude", {"threshold": 1}, 1.25),
        ("Bop", {"gamma": 1.0, "threshold": 0.1}, 4.25),
        ("frozen random", {}, 0.25),
    ],
)
@pytest.mark.parametrize("make", [lambda: normed_mlp(16), lambda: DigitConvNet(8, patches=True)])
def test_bytes_flips_and_zeros_are_recorded_for_every_method(label, changed, expected, make):
    torch.manual_seed(3)
    model = make()
    torch.optim.AdamW(model.parameters())  # torch wraps the class's step, on which Bop's builds
    optimizer = study.method(label, 4, **changed).build(model, {"lr": 0.01})
    series = observe_weights(4)(model, optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 1, 8, 8)).square().mean().backward()
        optimizer.step()
    # A row of 9 packed weights takes 3 bytes.
    assert series[BYTES] == [(step, pytest.approx(expected, rel=0.06)) for step in range(1, 5)]
    if label == "float32":
        assert series.keys() == {BYTES}
    else:
        assert [step for step, _ in series[FLIPS]] == [1, 2, 3, 4]
        assert (max(flips for _, flips in series[FLIPS]) > 0) == (label != "frozen random")
        assert all(0 < zeros < 1 for _, zeros in series[ZEROS])


def test_recorded_flips_and_zeros_match_the_trainers_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    steepest.ternary.ternarize(model)
    optimizer = steepest.build(model, "adamw", ternary={"threshold": 1})
    series = observe_weights(3)(model, optimizer)
    expected = []
    for x in torch.randn(3, 4, 8):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        stats = steepest.ternary.flip_stats(optimizer)
        expected.append((stats.flips / stats.weights, stats.zeros))
    assert max(expected)[0] > 0
    assert [value for _, value in series[FLIPS]] == pytest.approx([flips for flips, _ in expected])
    assert [value for _, value in series[ZEROS]] == pytest.approx([zeros for _, zeros in expected])


def test_a_study_runs_and_resumes(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    few = replace(study.TASKS["mlp"](), evaluations=1)
    monkeypatch.setattr(study, "TASKS", {"mlp": lambda: few})
    monkeypatch.setattr(study, "sweep", lambda *args, **options: sweep(*args, timing_seconds=0, **options))
    monkeypatch.setattr(study, "METHODS", {label: study.METHODS[label] for label in ("votes by sign", "Bop")})
    options = {"steps": 5, "seeds": 1, "lrs": [1e-2]}
    (result,) = ternary.run(tmp_path, ["mlp"], **options)
    votes, bop = (record for record in result.records if record.phase == "tuned")
    assert (votes.optimizer, bop.optimizer) == ("votes by sign", "Bop")
    weights = 256 * (64 + 256)
    floats = 2 * 2 * 256 + 2 * 256 + 2570  # of norms, scales and the output layer
    assert votes.parameters == bop.parameters == weights + floats - 2 * 256
    assert bop.state_bytes == pytest.approx(4 * weights + 8 * floats, rel=0.001)
    assert votes.state_bytes == pytest.approx(weights + 8 * floats, rel=0.001)
    assert votes.series[BYTES][0][1] == pytest.approx(1.25, rel=0.01)
    assert bop.series[BYTES][0][1] == pytest.approx(4.25, rel=0.01)
    assert bop.hyperparameters == {"weight_decay": 0, "lr": 0.01, **study.METHODS["Bop"]}
    lines = (tmp_path / "mlp" / "records.jsonl").read_text()
    ternary.run(tmp_path, ["mlp"], **options)
    assert (tmp_path / "mlp" / "records.jsonl").read_text() == lines


def test_no_seeds_are_none_and_not_the_default(tmp_path):
    pytest.importorskip("sklearn")
    with pytest.raises(LabError, match="seeds must be at least 1"):
        ternary.run(tmp_path, ["mlp"], seeds=0)


def test_an_unknown_task_is_rejected_by_name():
    with pytest.raises(LabError, match="unknown task 'cifar' in --tasks: choose mlp, convnet, text"):
        ternary.run("unused", ["cifar"])
