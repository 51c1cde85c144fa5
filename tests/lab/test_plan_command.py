"""`steepest plan` prints what plan() says, and refuses bad requests in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import steepest
from steepest.lab import cli
from steepest.model_shapes import model_shapes

TINY = [(each.name, each.shape) for each in model_shapes("tiny").tensors]


def make_mlp() -> nn.Module:
    """A model for --model."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def fail() -> nn.Module:
    raise RuntimeError("no\nmodel")


def test_optimizers_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", "--shapes", "tiny", "--optimizers", "adamw,lion,muon"]) == 0
    expected = steepest.compare_plans(TINY, ["adamw", "lion", "muon"])
    assert capsys.readouterr().out == f"{expected}\n"


def test_of_one_optimizer_the_tensors_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps(dict(TINY)))
    options = ["--dtype", "bfloat16", "--memory", "least", "--mesh", "2x2", "--rank", "3"]
    assert cli.run(["plan", "--shapes", str(path), "--optimizers", "muon", *options]) == 0
    from torch.distributed.tensor import Replicate, Shard

    placements = (Replicate(), Shard(0))
    expected = steepest.plan(
        TINY, "muon", param_dtype=torch.bfloat16, memory="least", mesh=(2, 2), placements=placements, rank=3
    )
    assert capsys.readouterr().out == f"{expected}\n"


def test_a_model_of_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    where = f"{__name__}:make_mlp"
    assert cli.run(["plan", "--model", where, "--optimizers", "lion", "--state-dtype", "int8"]) == 0
    assert capsys.readouterr().out == f"{steepest.plan(make_mlp(), 'lion', state_dtype='int8')}\n"


def test_a_budget_prints_what_build_takes(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_mlp()
    budget = steepest.plan(model, "adamw").total_bytes - 1
    given = ["--model", f"{__name__}:make_mlp", "--optimizers", "adamw,lion", "--budget", f"{budget}B"]
    assert cli.run(["plan", *given]) == 0
    plan = steepest.plan(model, rules=["adamw", "lion"], budget=budget)
    table, _, call = capsys.readouterr().out.partition("steepest.build(model, **")
    assert table == f"{plan}\n"
    assert eval(call.strip().removesuffix(")"), {"torch": torch}) == plan.arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing option '--model'"),
        (["--shapes", "gpt5"], "'gpt5' is neither a file nor one of tiny, "),
        (["--model", "nowhere"], "'nowhere' is neither a file nor one of tiny, "),
        (["--model", "nowhere:make"], "cannot load 'nowhere:make'"),
        (["--model", "torch.nn:Linearr"], "cannot load 'torch.nn:Linearr'"),
        (["--model", f"{__name__}:fail"], "cannot make a model: RuntimeError: no model"),
        (["--model", "builtins:dict"], "returned dict, not a torch.nn.Module"),
        (["--shapes", "tiny", "--optimizers", "loin"], "did you mean 'lion'"),
        (["--shapes", "tiny", "--optimizers", ""], "at least one"),
        (["--shapes", "tiny", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["--shapes", "tiny", "--state-dtype", "int3"], "bfloat16, float16, int8"),
        (["--shapes", "tiny", "--memory", "most"], "memory must be None or 'least'"),
        (["--shapes", "tiny", "--budget", "lots"], "budget must be a number of bytes"),
        (["--shapes", "tiny", "--budget", "1kB"], "nothing that fits into 1,000 bytes"),
        (["--shapes", "tiny", "--mesh", "a"], "bad --mesh 'a'"),
        (["--shapes", "tiny", "--mesh", "2", "--rank", "2"], "rank must be 0 to 1 on a mesh of 2, got 2"),
        (["--shapes", "tiny", "--layout", "replicate"], "--layout needs --mesh"),
        (["--shapes", "tiny", "--device", "abacus"], "abacus"),
        (["--shapes", "{tmp}/nested.json"], "maximum recursion depth"),
        (["--shapes", "{tmp}/huge.json"], "Overflow"),
    ],
    ids=str,
)
def test_a_bad_request_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nested.json").write_text("[" * 10_000)
    (tmp_path / "huge.json").write_text('{"weight": [1000000000000000000000000, 2]}')
    assert cli.run(["plan", *[argument.format(tmp=tmp_path) for argument in arguments]]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.startswith("steepest: error: ")
    assert captured.err.count("\n") == 1
