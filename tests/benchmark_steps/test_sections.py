"""Every section runs at toy size, and what its columns say can be checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.steps.__main__ import main
from benchmarks.steps.first_step import main as first_steps
from benchmarks.steps.sections import SECTIONS, polar, sharded, symmetric
from benchmarks.steps.sharded_job import matrices

from steepest.model_shapes import model_shapes

TOY = ["--model", "tiny", "--rounds", "2", "--no-compile", "--no-peers", "--threads", "1"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    out = tmp_path_factory.mktemp("steps")
    names = "machine,symmetric,steps,families,host,ternary,sharded"
    results = main([*TOY, "--optimizers", "lion,muon", "--sections", names, "--out", str(out)])
    written = json.loads((out / "steps.json").read_text())
    assert [each["title"] for each in written["results"]] == [each.title for each in results]
    assert "| lion | steepest | eager |" in (out / "RESULTS.md").read_text()
    return {name: [each for each in results if each.section == name] for name in names.split(",")}


def test_every_column_has_a_value_in_some_row(tables: dict[str, list[Any]]) -> None:
    assert [len(tables[name]) for name in tables] == [1, 1, 2, 1, 1, 2, 2]
    for result in (each for some in tables.values() for each in some):
        assert result.rows, result.notes
        for column in result.columns:
            if column.key not in ("reason", "times_ours"):
                assert any(row.get(column.key) not in (None, "") for row in result.rows), column


def test_of_one_block_the_hidden_matrices_are_stepped(tables: dict[str, list[Any]]) -> None:
    element, matrix = tables["steps"]
    assert [row["label"] for row in element.rows] == ["axpy", "lion"]
    assert element.rows[1]["parameters"] == model_shapes("tiny").numel
    assert "4 hidden matrices of 1 of 2 blocks" in matrix.title


def test_ternary_rates_follow_from_bytes_and_times(tables: dict[str, list[Any]]) -> None:
    layers, passes = tables["ternary"]
    assert [row["times_dense"] for row in layers.rows if row["label"] == "dense"] == [1.0, 1.0]
    # In float32 axpy moves 3 numbers and AdamW 7; packed weights take 1/4 byte, votes and counters 1 byte.
    expected = {
        "axpy": 12,
        "copy": 2,
        "pack": 1.25,
        "flip": 3.5,
        "flip, int16 counters": 5.5,
        "AdamW, fused": 28,
    }
    found = {row["label"]: row for row in passes.rows}
    assert {label: found[label]["bytes_per_weight"] for label in expected} == expected
    assert found["axpy"]["of_axpy"] == found["copy"]["of_copy"] == 1
    assert "pack, compiled" not in found


def test_sharded_steps_send_what_the_formulas_say(tables: dict[str, list[Any]]) -> None:
    ours = [row for row in tables["sharded"][0].rows if row["source"] == "steepest"]
    elements = sum(tensor.numel for tensor in matrices(toy=True))
    assert len(ours) == 5
    for row in ours:
        width = 2 if row["label"] == "owners, exchange in bfloat16" else 4
        # Half of the elements travel there and back; everywhere, each sends its half to the other.
        assert row["formula_bytes"] == elements * width // 2
        # In each wave both owners tell whether they failed.
        everywhere = row["label"] == "everywhere"
        assert row["sent_bytes"] == row["formula_bytes"] + (0 if everywhere else 8 * row["waves"])
        assert row["collectives"] == 1 + (1 if everywhere else 2) * row["waves"]
        assert 0 < row["temporary_bytes"] <= row["planned_bytes"]


def test_loads_are_even_where_there_are_enough_matrices() -> None:
    for model, world in sharded.PLANS:
        row = sharded.load(model, world)
        assert row["per_process"] >= 8
        assert row["balance"] <= 1.02


def test_errors_of_polar_factors_are_those_of_the_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that returns twice the polar factor is off by 1 in every direction."""

    def twice(x: torch.Tensor) -> torch.Tensor:
        u, _, vt = torch.linalg.svd(x.double(), full_matrices=False)
        return 2 * u @ vt

    monkeypatch.setattr(polar, "_functions", lambda norms: [("twice", "frobenius", twice)])
    config: Any = type("Config", (), {"toy": True, "full": False, "device": torch.device("cpu")})
    (row,) = polar.errors(config).rows
    assert row["top"] == pytest.approx(2)
    assert all(row[f"{kind}, worst"] == pytest.approx(1, abs=1e-6) for kind in polar.KINDS)


@pytest.mark.parametrize("squared", [False, True])
def test_full_and_symmetric_products_agree(squared: bool) -> None:
    stack = symmetric.Stack(2, 40, 40 if squared else 70, torch.float32, squared)
    calls: Any = stack.calls(torch.device("cpu"))
    torch.testing.assert_close(calls["full"](), calls["symmetric"](), rtol=1e-5, atol=1e-5)
    assert stack.flops == 2 * 2 * 40 * 40 * stack.inner


def test_the_first_step_and_the_second_are_timed() -> None:
    case, model = "steepest:signgsd:eager", "tiny"
    found = first_steps({"key": case, "model": model, "device": "cpu", "dtype": "float32", "threads": 1})
    assert set(found) == {"first", "second"}
    assert min(found.values()) > 0


def test_a_failing_section_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(config: object) -> Any:
        raise RuntimeError("no device")
        yield

    monkeypatch.setitem(SECTIONS, "machine", fail)
    arguments = [*TOY, "--optimizers", "lion", "--sections", "machine,host", "--out", str(tmp_path)]
    failed, host = main(arguments)
    assert (failed.notes, host.rows[0]["label"]) == (["RuntimeError: no device"], "lion")
