"""The study of ternary training: methods against their definitions, weight statistics, a complete run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import steepest
from steepest.lab import LabError
from steepest.lab.cli import run
from steepest.lab.ternary import run_study, study
from steepest.lab.ternary.bop import BopAdamW, BopLinear
from steepest.lab.ternary.latent import LatentTernaryLinear, make_latent
from steepest.lab.ternary.methods import LABELS, Thresholds, method_specs
from steepest.lab.ternary.models import PatchConv, PatchConvNet, normed_mlp
from steepest.lab.ternary.report import table, write
from steepest.lab.ternary.weight_stats import WeightStats, read_weight_stats, record_weight_stats
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
    ("method", "expected"),
    [
        ("adamw", 12),
        ("ste", 12),
        ("votes_sign", 1.25),
        ("votes_magnitude", 1.25),
        ("bop", 4.25),
        ("frozen", 0.25),
    ],
)
@pytest.mark.parametrize("make", [lambda: normed_mlp(16), lambda: PatchConvNet(8)])
def test_bytes_flips_and_zeros_are_recorded_for_every_method(method, expected, make, tmp_path):
    torch.manual_seed(3)
    model, file = make(), tmp_path / "flips.jsonl"
    thresholds = Thresholds(sign={"threshold": 1}, magnitude={"threshold": 1}, gamma=1.0, bop=0.1)
    spec = next(spec for spec in method_specs(thresholds, 4, file) if spec.label == method)
    optimizer = spec.build(model, 0.01)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 1, 8, 8)).square().mean().backward()
        optimizer.step()
    (stats,) = read_weight_stats(file)
    assert (stats.method, stats.lr, stats.seed, stats.steps) == (method, 0.01, 3, [1, 2, 3, 4])
    # A row of 9 packed weights takes 3 bytes.
    assert stats.bytes_per_weight == pytest.approx(expected, rel=0.06)
    if method == "adamw":
        assert all(math.isnan(value) for value in stats.flips + stats.zeros)
    else:
        assert (max(stats.flips) > 0) == (method != "frozen")
        assert all(0 < value < 1 for value in stats.zeros)


def test_recorded_flips_and_zeros_match_the_trainers_statistics(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    steepest.ternary.ternarize(model)
    optimizer = steepest.build(model, "adamw", ternary={"threshold": 1})
    file = tmp_path / "flips.jsonl"
    record_weight_stats(optimizer, model, WeightStats("votes_sign", 0.1, 0), 3, file)
    expected = []
    for x in torch.randn(3, 4, 8):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        stats = steepest.ternary.flip_stats(optimizer)
        expected.append((stats.flips / stats.weights, stats.zeros))
    (recorded,) = read_weight_stats(file)
    assert list(zip(recorded.flips, recorded.zeros, strict=True)) == [
        pytest.approx(pair) for pair in expected
    ]


@pytest.fixture
def short(monkeypatch):
    """Only the perceptron's study."""
    monkeypatch.setattr(study, "STUDIES", {"mlp": study.STUDIES["mlp"]})


def test_a_study_runs_reports_and_resumes(tmp_path, short):
    pytest.importorskip("sklearn")
    options = {"steps": 5, "trials": 2, "seeds": 2}
    (result,) = run_study(tmp_path, **options)
    assert {row.optimizer for row in result.race.rows} == set(LABELS)
    for method in LABELS:
        assert len(result.tuned_stats(method)) == 2
    lines = (tmp_path / "mlp" / "records.jsonl").read_text()
    (again,) = run_study(tmp_path, **options)
    assert (tmp_path / "mlp" / "records.jsonl").read_text() == lines
    assert table([again]) == table([result])
    page = write(tmp_path, [result])
    text = page.read_text()
    assert "| votes by sign |" in text
    assert "| 1.25 |" in text
    assert (tmp_path / "ternary.png").stat().st_size > 10_000
    (fresh,) = run_study(tmp_path, steps=3, trials=1, seeds=1, fresh=True)
    assert {record.steps for record in fresh.race.records} == {3}
    assert all(json.loads(line)["steps"][-1] == 3 for line in (tmp_path / "mlp" / "flips.jsonl").open())


def test_the_command_line_runs_the_study(tmp_path, short, capsys):
    pytest.importorskip("sklearn")
    out = tmp_path / "out"
    arguments = ["race", "--task", "ternary", "--steps", "3", "--trials", "1", "--seeds", "1"]
    assert run([*arguments, "--out", str(out)]) == 0
    assert "frozen random ternary weights" in capsys.readouterr().out
    assert (out / "ternary.md").exists()


@pytest.mark.parametrize(
    "option",
    [
        ["--budget", "5m"],
        ["--model", "mlp"],
        ["--batch", "3"],
        ["--text", "."],
        ["--optimizers", "lion"],
        ["--device", "auto"],
        *([f"--{name}", "2"] for name in ("width", "depth", "heads", "context")),
    ],
)
def test_options_that_the_study_fixes_are_rejected(option, capsys):
    assert run(["race", "--task", "ternary", *option]) == 2
    assert f"{option[0]} cannot be combined with --task ternary" in capsys.readouterr().err


def test_an_unknown_study_is_rejected_by_name():
    with pytest.raises(LabError, match="no study 'cifar'"):
        run_study("unused", ["cifar"])
