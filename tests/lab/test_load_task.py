"""Tasks by name and from modules of the user."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from steepest.lab import LabError
from steepest.lab.tasks.load import load_task, parse_settings

MODULE = """
import torch
from torch.utils.data import DataLoader
from steepest.lab import Task

calls = 0

def loss(model, batch):
    return (model(batch) - 3 * batch).square().mean()

def mine(count=30, *, kind: str = "list", device="none"):
    global calls
    calls += 1
    data = torch.arange(1.0, count + 1).view(-1, 1)
    batches = {
        "list": list(data.split(1)),
        "loader": DataLoader(data, batch_size=1, shuffle=True),
        "iterator": iter(data),
        "number": 3,
    }[kind]
    return torch.nn.Linear(1, 1), batches, loss

task = Task("ready", lambda seed: torch.nn.Linear(1, 1), lambda seed: [], loss, lambda m, s: {}, ())

def returns_task(steps: int = 7):
    return Task("built", lambda seed: None, lambda seed: [], loss, lambda m, s: {}, (), steps=steps)

shared = torch.nn.Linear(1, 1)
def same():
    return shared, [torch.ones(1, 1)] * 5, loss

def swapped():
    return [torch.ones(1, 1)] * 5, shared, loss

def requires(size: int):
    return mine(size)

number = 5
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "users.module", raising=False)
    monkeypatch.delitem(sys.modules, "users", raising=False)
    return "users.module"


@pytest.mark.parametrize("kind", ["list", "loader"])
def test_a_triples_last_batches_are_held_out(module, kind):
    task = load_task(f"{module}:mine", {"count": "25", "kind": kind})
    trained = [[batch.item() for batch in task.batches(seed)] for seed in (0, 1, 0)]
    assert trained[0] == trained[2] != trained[1]
    # A model without weights tells which batches it is given by its loss (0 − 3x)².
    zero = nn.Linear(1, 1).requires_grad_(False)
    for parameter in zero.parameters():
        parameter.zero_()
    means = [task.evaluate(zero, split)["loss"] / 9 for split in ("validation", "test")]
    if kind == "list":
        assert {*trained[0]} == {*trained[1]} == {*range(1, 22)}
        assert means == pytest.approx([(22**2 + 23**2) / 2, (24**2 + 25**2) / 2])
    # In whatever order the loader shuffled: all squares together, each held out or trained on.
    assert sum(x * x for x in trained[0]) + 2 * sum(means) == pytest.approx(sum(x * x for x in range(26)))
    assert task.evaluate(zero, "test") == task.evaluate(zero, "test")
    assert task.config == {"train_batches": 21, "validation_batches": 2, "test_batches": 2}
    assert task.metric.name == "loss"


def test_a_triples_model_is_fresh_and_follows_the_seed(module):
    task = load_task(f"{module}:mine")
    calls = sys.modules[module].calls
    assert calls == 1
    weights = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        weights.append(task.make(seed).weight.item())
    assert weights[0] == weights[2] != weights[1]
    assert sys.modules[module].calls == 4


def test_a_task_and_a_function_that_returns_one(module):
    assert load_task(f"{module}:task") is sys.modules[module].task
    assert load_task(f"{module}:returns_task", {"steps": "12"}).steps == 12


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("nothing", {}, "unknown task 'nothing': choose text, digits, images, sasrec, or your own as"),
        ("users.module:", {}, "unknown task 'users.module:'"),
        ("users.missing:mine", {}, "cannot load 'users.missing:mine': ModuleNotFoundError: No module named"),
        (
            "users.module:absent",
            {},
            "cannot load 'users.module:absent': AttributeError: module .* has no attribute 'absent'",
        ),
        ("users.module:number", {}, "is neither a Task nor callable: 5"),
        ("users.module:task", {"a": "1"}, "is a Task, which has no settings: got a"),
        ("users.module:mine", {"counts": "3"}, "has no setting 'counts': it has count, kind"),
        ("users.module:mine", {"count": "many"}, "count='many': Input should be a valid integer"),
        ("users.module:mine", {"device": "cpu"}, "has no setting 'device'"),
        ("users.module:mine", {"count": "2"}, "has 2 batches, but needs at least 3"),
        (
            "users.module:mine",
            {"kind": "iterator"},
            "its batches are a .*iterator: return a list",
        ),
        ("users.module:mine", {"kind": "number"}, "its batches are a int"),
        ("users.module:swapped", {}, r"it returned \['list', 'Linear', 'function'\]"),
        ("users.module:requires", {}, "missing a required argument: 'size'; give it as a setting"),
    ],
)
def test_what_cannot_be_a_task_is_explained(module, name, settings, message):
    with pytest.raises(LabError, match=message):
        load_task(name, settings)


def test_a_model_that_is_not_built_anew_is_rejected(module):
    with pytest.raises(LabError, match="returned the same, trained model again"):
        load_task(f"{module}:same").make(0)


def test_the_modules_own_error_is_shown(module, tmp_path):
    (tmp_path / "users" / "broken.py").write_text("import absent_package")
    with pytest.raises(
        LabError, match=r"cannot load 'users.broken:mine': .*No module named 'absent_package'"
    ):
        load_task("users.broken:mine")


def test_settings_have_the_types_of_the_signature():
    def function(
        path: Path | None = None, rate: float = 1.0, on: bool = False, sizes: list[int] | None = None, plain=3
    ):
        """Take settings."""

    values = parse_settings("f", function, {"path": "a/b", "rate": "2", "on": "true", "plain": "4"})
    assert values == {"path": Path("a/b"), "rate": 2.0, "on": True, "plain": 4}
    assert [type(value) for value in values.values()] == [type(Path()), float, bool, int]
    with pytest.raises(LabError, match=re.escape("f has no setting 'sizes': it has path, rate, on, plain")):
        parse_settings("f", function, {"sizes": "1"})


def test_built_in_tasks_take_settings():
    pytest.importorskip("sklearn")
    task = load_task("images", {"channels": "2", "batch": "16", "augment": "no"})
    assert (task.config["channels"], task.config["batch"], task.config["augment"]) == (2, 16, False)
    with pytest.raises(LabError, match="images: model='vgg': Input should be 'resnet18' or 'vit_s16'"):
        load_task("images", {"model": "vgg"})
    with pytest.raises(LabError, match="images has no setting 'chanels': it has data, model, size, batch"):
        load_task("images", {"chanels": "2"})
