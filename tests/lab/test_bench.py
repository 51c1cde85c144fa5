"""The bench: a row per optimizer, with exact bytes, beside a baseline; on the user's own model, too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from steepest.lab.bench import costs
from steepest.lab.bench.models import make_model, meta_model
from steepest.lab.bench.run import bench
from steepest.lab.errors import LabError
from steepest.lab.records import Experiment
from steepest.lab.report import write_report
from steepest.lab.training import timing
from steepest.model_shapes import model_shapes

from .conftest import make_experiment

SGD = "torch.optim:SGD"
TINY = [(tensor.name, tensor.shape) for tensor in model_shapes("tiny").tensors]


class Clock:
    """A clock that only steps of `Slow` advance, and readings, by a little."""

    seconds = 0.0

    def now(self, device: torch.device) -> float:
        self.seconds += 0.05
        return self.seconds


CLOCK = Clock()


class Slow(torch.optim.SGD):
    """Removes its gradients, and takes ten times as long as the others."""

    steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert all(p.grad is not None for group in self.param_groups for p in group["params"])
        super().step()
        self.steps += 1
        self.zero_grad(set_to_none=True)
        CLOCK.seconds += 0.45


class Broken(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("no\nkernel")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "now", CLOCK.now)


@pytest.fixture
def in_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a user's module, as the current one."""
    (tmp_path / "mine_of_bench.py").write_text(
        "import torch\n"
        "def tied():\n"
        "    hidden = torch.nn.Linear(16, 16, dtype=torch.bfloat16)\n"
        "    last = torch.nn.Linear(16, 50, bias=False)\n"
        "    model = torch.nn.Sequential(torch.nn.Embedding(50, 16), hidden, last)\n"
        "    model[2].weight = model[0].weight\n"
        "    model[1].bias.requires_grad_(False)\n"
        "    return model\n"
        "def from_file():\n"
        "    model = torch.nn.Linear(3, 2)\n"
        "    assert model.weight.sum().item() < 99, 'which the meta device cannot tell'\n"
        "    return model\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_of_bench", raising=False)
    return tmp_path


@pytest.mark.usefixtures("clock")
def test_state_is_exact_and_ratios_are_those_of_the_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def temporary_bytes(step: Any, device: torch.device) -> int:
        # The first steps make the state, which is not temporary.
        assert getattr(step.__self__, "steps", 2) == 2
        step()
        return 1000

    monkeypatch.setattr(costs, "temporary_bytes", temporary_bytes)
    names = ["adamw", "lion", "signgsd", "muon"]
    here = __name__
    experiment, found = bench(
        "tiny", [*names, f"slow={here}:Slow", f"broken={here}:Broken"], baseline=SGD, rounds=3, out=tmp_path
    )
    for name in names:
        cost = found.costs[name]
        assert cost.state_bytes == steepest.plan(TINY, name).state_bytes, name
        assert cost.parameters == model_shapes("tiny").numel
        assert cost.peak_bytes == cost.state_bytes + 1000
    assert found.costs["adamw"].state_bytes > 8 * found.costs["adamw"].parameters
    assert found.costs["signgsd"].state_bytes == 0
    # All take 50 ms, but one takes 500.
    assert {label: round(cost.ratio or 0, 6) for label, cost in found.costs.items()} == {
        SGD: 1.0,
        **dict.fromkeys(names, 1.0),
        "slow": 10.0,
    }
    # axpy moves 3 numbers per parameter, and Lion 5, with state.
    assert found.costs["lion"].bandwidth == pytest.approx(5 / 3)
    assert found.failed == {"broken": "RuntimeError: no kernel"}
    saved = Experiment.load(tmp_path)
    assert saved == experiment
    assert (saved.kind, saved.baseline, list(saved.costs)) == ("bench", SGD, [SGD, *names, "slow"])
    assert saved.not_run == found.failed


def test_on_the_users_model_ties_and_frozen_parameters_stay(in_module: Path) -> None:
    _, found = bench("mine_of_bench:tied", ["adamw"], rounds=1)
    trained = 50 * 16 + 16 * 16
    assert {cost.parameters for cost in found.costs.values()} == {trained}
    # Two moments in the parameters' dtypes, and a float32 step count a tensor.
    assert found.costs["adamw"].state_bytes == 8 * 50 * 16 + 4 * 16 * 16 + 2 * 8
    assert isinstance(make_model("mine_of_bench:from_file"), nn.Linear)
    assert meta_model("mine_of_bench:from_file", torch.float16).weight.dtype == torch.float16


@pytest.mark.usefixtures("clock")
def test_what_does_not_fit_is_planned_and_marked() -> None:
    numel = model_shapes("tiny").numel
    plans = {rule: steepest.plan(TINY, rule) for rule in ("signgsd", "lion", "adamw")}
    needs = {rule: each.state_bytes + each.temporary_bytes for rule, each in plans.items()}
    room = needs["lion"] + (needs["adamw"] - needs["lion"]) // 2
    memory = 8 * numel + needs["signgsd"] + room
    _, found = bench("tiny", ["lion", "adamw", SGD], baseline="signgsd", rounds=1, memory=memory)
    assert found.costs["signgsd"].planned is found.costs["lion"].planned is False
    adamw = found.costs["adamw"]
    assert (adamw.planned, adamw.optimizer_ms) == (True, None)
    assert adamw.state_bytes == 8 * numel + 8 * len(model_shapes("tiny").tensors)
    _, found = bench("llama-70b", ["muon"], memory=1 << 30)
    assert {cost.planned for cost in found.costs.values()} == {True}
    assert found.costs["torch.optim:AdamW"].state_bytes / model_shapes("llama-70b").numel == pytest.approx(8)
    assert not any(cost.ratio or cost.bandwidth for cost in found.costs.values())


def test_batches_fit_and_hold_the_baseline() -> None:
    class Spec:
        def __init__(self, label: str) -> None:
            self.label = label

    specs: Any = [Spec(label) for label in "abcdef"]
    needs = {"a": 2, "b": 3, "c": 3, "d": 3, "e": 7, "f": 1}
    batches = costs._batches(specs, needs, "a", 8)
    assert [[each.label for each in batch] for batch in batches] == [["a", "b", "c"], ["a", "d", "f"]]
    assert costs._batches(specs, needs, "a", 1) == [[specs[-1]]]
    assert costs._batches(specs, needs, "a", 0) == []


@pytest.mark.parametrize(
    ("model", "optimizers", "options", "words"),
    [
        ("gpt5", ["lion"], {}, "'gpt5' is neither a file nor one of tiny, "),
        ("nowhere:make", ["lion"], {}, "cannot load 'nowhere:make'"),
        ("torch.nn:Linearr", ["lion"], {}, "cannot load 'torch.nn:Linearr'"),
        ("builtins:dict", ["lion"], {}, "returned dict, not a torch.nn.Module"),
        ("tiny", ["loin"], {}, "lion"),
        ("tiny", ["torch.optim:Nadamm"], {}, "torch.optim:Nadamm"),
        ("tiny", ["lion"], {"settings": ["lion.beta=1"]}, "beta"),
        ("tiny", ["lion"], {"baseline": f"{__name__}:Broken"}, "the baseline cannot step: RuntimeError"),
    ],
)
def test_a_bad_request_is_one_clear_error(
    model: str, optimizers: list[str], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(LabError, match=words) as caught:
        bench(model, optimizers, rounds=1, **options)
    assert "\n" not in str(caught.value)


def test_the_page_lists_the_costs_and_speaks_of_no_training(tmp_path: Path) -> None:
    _, found = bench("tiny", ["lion"], rounds=1, out=tmp_path)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Too short" not in page
    for cost in found.costs.values():
        row = page[page.index(f'<td data-label="step, ms">{cost.optimizer_ms:.4g}</td>') :]
        assert f'<td data-label="state B/param">{cost.state_bytes / cost.parameters:.2f}</td>' in row


def test_another_experiment_is_not_replaced(tmp_path: Path) -> None:
    make_experiment(["adamw"]).save(tmp_path)
    before = (tmp_path / "experiment.json").read_bytes()
    with pytest.raises(LabError, match="holds another experiment: choose another directory"):
        bench("tiny", ["lion"], rounds=1, out=tmp_path)
    assert (tmp_path / "experiment.json").read_bytes() == before
