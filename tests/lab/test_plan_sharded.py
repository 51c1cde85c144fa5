from __future__ import annotations

import re
from pathlib import Path

import pytest

from steepest.lab.errors import LabError
from steepest.lab.plan_sharded import compare, layout_of, mesh_of, owners, plan, shapes_of

from .test_cli import run_main

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
    assert shapes_of(None, tmp_path / name) == SHAPES


def test_of_a_model_the_hidden_matrices_count() -> None:
    found = shapes_of("llama-70b", None)
    assert len(found) == 560
    assert found[0] == ("layers.0.self_attn.q_proj.weight", (8192, 8192))


@pytest.mark.parametrize("text", ["[1, 2]", "{", '{"a": "b"}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text, encoding="utf-8")
    with pytest.raises(LabError, match=r"cannot read .*bad\.json as JSON"):
        shapes_of(None, tmp_path / "bad.json")


def test_the_owners_are_those_of_the_plan() -> None:
    found = plan(SHAPES, mesh_of("2"), layout_of(None, (2,)), "muon", 8)
    assert [(row["name"], row["shape"], row["owners"]) for row in owners(found).rows] == [
        ("layers.*.q (2)", "8×8", "0 1"),
        ("head", "4×8", "0"),
    ]


def test_a_row_for_every_mesh() -> None:
    rows = compare(SHAPES, ["2", "2x2"], None, "muon", flops=1e-9, near=1e-6, far=1e-6).rows
    assert [(row["mesh"], row["layout"], row["replicas"]) for row in rows] == [
        ("2", "shard(0)", 1),
        ("2x2", "replicate, shard(0)", 1),
    ]
    # 30 n³ flops for 8×8; the smaller matrix is 8·4²·8 + 28·4³ flops, at 1000 flops a second.
    costs = [30 * 8**3, 30 * 8**3, 8 * 4**2 * 8 + 28 * 4**3]
    assert rows[0]["compute_ms"] == pytest.approx(costs[0] + costs[2])
    assert rows[0]["everywhere_ms"] == pytest.approx(sum(costs))
    # Half of each matrix travels there and back; and each owner says whether it failed. 1000 bytes a second.
    sent = (2 * 64 + 32) * 4 // 2 + 8
    assert (rows[0]["sent"], rows[0]["exchange_ms"]) == (sent, pytest.approx(sent))
    assert rows[0]["narrow_ms"] == pytest.approx((sent - 8) / 2 + 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "8"], "give --model or --shapes"),
        (["--mesh", "8", "--model", "gpt-9"], "no model 'gpt-9' to plan for"),
        (["--mesh", "8,8", "--model", "tiny"], "no mesh '8,8'"),
        (["--mesh", "2x2", "--model", "tiny", "--layout", "shard(0)"], "1 placements for a mesh of 2"),
        (["--mesh", "2", "--model", "tiny", "--layout", "cut"], "no placement 'cut'"),
        (["--mesh", "2", "--model", "tiny", "--layout", "shard(7)"], "a dimension that .* does not have"),
        (["--mesh", "2", "--model", "tiny", "--rule", "lion"], "sees no whole matrices"),
        (["--mesh", "2", "--model", "tiny", "--dtype", "int3"], "no dtype 'int3'"),
        (["--mesh", "2", "--model", "tiny", "--node", "0"], "must be positive"),
    ],
)
def test_a_bad_request_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main("plan-sharded", *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_the_command_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--model",
        "tiny",
        "--mesh",
        "2x2",
        "--mesh",
        "4",
        "--owners",
        "--exchange-dtype",
        "bfloat16",
    ]
    assert run_main("plan-sharded", *arguments, "--bucket-bytes", "100000") == 0
    shown = capsys.readouterr().out
    assert "8 matrices, 24,576 elements" in shown
    assert shown.count("Owners on 4 ranks") == 2
