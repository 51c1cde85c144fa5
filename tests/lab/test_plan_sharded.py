from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from steepest.lab import cli
from steepest.lab.cli.plan_sharded import matrices, mesh_row, owner_rows, plan
from steepest.lab.errors import LabError

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
    rows = owner_rows(plan(SHAPES, "2", None, "muon"))
    assert [(row["matrix"], row["shape"], row["owners"]) for row in rows] == [
        ("layers.*.q (2)", "8×8", "0 1"),
        ("head", "4×8", "0"),
    ]


def test_a_row_of_a_mesh_has_the_plans_times() -> None:
    found, narrow = (
        plan(SHAPES, "2", None, "muon", exchange_dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    row = mesh_row("2", None, found, narrow, 1e3, 1e3, 1e3)
    assert (row["mesh"], row["layout"], row["replicas"]) == ("2", "shard(0)", 1)
    # 30 n³ flops for 8×8; the smaller matrix is 8·4²·8 + 28·4³ flops, at 1000 flops a second.
    costs = [30 * 8**3, 30 * 8**3, 8 * 4**2 * 8 + 28 * 4**3]
    assert row["compute, ms"] == pytest.approx(costs[0] + costs[2])
    assert row["everywhere, ms"] == pytest.approx(sum(costs))
    # Half of each matrix travels there and back; and each owner says whether it failed. 1000 bytes a second.
    sent = (2 * 64 + 32) * 4 // 2 + 8
    assert row["sent, MiB"] == sent / 2**20
    assert row["exchange, ms"] == pytest.approx(sent)
    assert row["in bfloat16, ms"] == pytest.approx((sent - 8) / 2 + 8)
    assert mesh_row("2x2", None, found, narrow, 1, 1, 1)["layout"] == "replicate, shard(0)"


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
    assert shown.count("Owners on 4 ranks") == 2
