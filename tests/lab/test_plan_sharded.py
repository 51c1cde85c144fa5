from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch.distributed.tensor import Replicate, Shard

from steepest.lab import cli
from steepest.lab.cli.plan_sharded import matrices
from steepest.lab.errors import LabError
from steepest.planning import plan_sharded
from steepest.planning.table import meshes_table

SHAPES = [("layers.0.q", (8, 8)), ("layers.1.q", (8, 8)), ("head", (4, 8))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("shapes.json", '{"layers.0.q": [8, 8], "layers.1.q": [8, 8], "norm": [8], "head": [4, 8]}'),
        ("pairs.json", '[["layers.0.q", [8, 8]], ["layers.1.q", [8, 8]], ["head", [4, 8]]]'),
        ("shapes.csv", "name,shape\nlayers.0.q,8x8\nlayers.1.q,8x8\nnorm,8\n\nhead,4x8\n"),
    ],
)
def test_matrices_are_read_from_files(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert matrices(str(tmp_path / name)) == SHAPES


def test_a_function_s_matrices_are_those_of_its_model() -> None:
    assert matrices("torch.nn:Transformer")[:2] == [
        ("encoder.layers.0.self_attn.in_proj_weight", (1536, 512)),
        ("encoder.layers.0.self_attn.out_proj.weight", (512, 512)),
    ]


def test_of_a_model_the_hidden_matrices_count() -> None:
    found = matrices("llama-70b")
    assert len(found) == 560
    assert found[0] == ("layers.0.self_attn.q_proj.weight", (8192, 8192))


@pytest.mark.parametrize("text", ["[1, 2]", "{", '{"a": "b"}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text, encoding="utf-8")
    with pytest.raises(LabError, match=r"cannot read .*bad\.json as JSON"):
        matrices(str(tmp_path / "bad.json"))


def test_the_owners_are_those_of_the_plan() -> None:
    plan = plan_sharded(SHAPES, (2,), [Shard(0)])
    assert str(plan).splitlines()[2:] == [
        "layers.*.q (2)  8×8      1.54e-05  0 1",
        "head            4×8      2.82e-06  0",
    ]
    assert [unit.owner for unit in plan.units] == [0, 1, 0]


def test_long_lists_of_owners_are_wrapped_and_lose_none() -> None:
    plan = plan_sharded([(f"h.{n}.q", (8, 8)) for n in range(100)], (64,), [Shard(0)])
    lines = str(plan).splitlines()
    assert max(map(len, lines)) <= 110
    listed = " ".join(lines[2:]).split()[4:]
    assert listed == [str(unit.owner) for unit in plan.units]


def test_a_line_of_a_mesh_has_the_plans_times() -> None:
    plans = {
        "2": plan_sharded(SHAPES, (2,), [Shard(0)]),
        "2x2": plan_sharded(SHAPES, (2, 2), [Replicate(), Shard(0)]),
    }
    line, other = (line.split() for line in meshes_table(plans, 1e3, 1e3, 1e3).splitlines()[2:])
    # 30 n³ flops for 8×8; the smaller matrix is 8·4²·8 + 28·4³ flops, at 1000 flops a second.
    costs = [30 * 8**3, 30 * 8**3, 8 * 4**2 * 8 + 28 * 4**3]
    # Half of each matrix travels there and back; and each owner says whether it failed. 1000 bytes a second.
    sent = (2 * 64 + 32) * 4 // 2 + 8
    times = [f"{ms:,}" for ms in (costs[0] + costs[2], sent, sum(costs))]
    assert line[:2] == ["2", "1"]
    assert line[4:6] == [str(sent), "B"]
    assert line[-3:] == times
    assert other[:2] == ["2x2", str(plans["2x2"].replicas)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "8"], "--shapes"),
        (["--mesh", "8", "--shapes", "gpt-9"], "'gpt-9' is neither a file nor one of"),
        (["--mesh", "8,8", "--shapes", "tiny"], "bad --mesh '8,8'"),
        (["--mesh", "2x2", "--shapes", "tiny", "--layout", "shard(0)"], "1 placements for a mesh of 2"),
        (["--mesh", "2", "--shapes", "tiny", "--layout", "cut"], "bad placement 'cut'"),
        (["--mesh", "2", "--shapes", "tiny", "--layout", "shard(7)"], "a dimension that .* does not have"),
        (["--mesh", "2", "--shapes", "tiny", "--rule", "lion"], "needs no whole matrices"),
        (["--mesh", "2", "--shapes", "tiny", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["--mesh", "2", "--shapes", "tiny", "--node", "0"], "must be positive"),
        (["--mesh", "2", "--shapes", "tiny", "--tflops", "nan"], "must be positive"),
        (["--mesh", "1" + "0" * 20, "--shapes", "tiny"], "bad --mesh '100"),
        (["--mesh", "2", "--shapes", "tiny", "--layout", f"shard({10**20})"], "bad placement 'shard"),
    ],
)
def test_a_bad_request_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["plan-sharded", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_the_command_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--shapes",
        "tiny",
        "--mesh",
        "2x2",
        "--mesh",
        "4",
        "--owners",
        "--exchange-dtype",
        "bfloat16",
    ]
    assert cli.run(["plan-sharded", *arguments, "--bucket-bytes", "100000"]) == 0
    shown = capsys.readouterr().out
    assert "8 matrices, 24,576 elements" in shown
    assert "Owners on 2x2" in shown
    assert "Owners on 4\n" in shown
