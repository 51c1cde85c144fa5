from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from steepest.lab.bench import bench
from steepest.lab.bench.sections import ON_REQUEST, SECTIONS, sharded
from steepest.lab.bench.sections.sharded import PLANS, _load
from steepest.lab.bench.sharded_job import cases, matrices

from .fakes import config


@pytest.fixture(scope="module")
def results() -> list[Any]:
    return bench(["tiny"], ["muon"], sections=["sharded"], rounds=2).results


def test_two_processes_take_all_steps(results: list[Any]) -> None:
    steps, _ = results
    assert [row["reason"] for row in steps.rows] == [""] * len(steps.rows)
    assert {row["processes"] for row in steps.rows} == {2}
    assert all(row["step_ms"] > 0 for row in steps.rows)
    assert [row["label"] for row in steps.rows if row["times_owners"] == 1] == ["owners"]
    assert "torch" in {row["source"] for row in steps.rows}


def test_counted_bytes_are_the_formulas(results: list[Any]) -> None:
    ours = [row for row in results[0].rows if row["source"] == "steepest"]
    elements = sum(tensor.numel for tensor in matrices(toy=True))
    for row in ours:
        width = 2 if row["label"] == "owners, exchange in bfloat16" else 4
        # Half of the elements travel there and back; everywhere, each sends its half to the other.
        assert row["formula_bytes"] == elements * width // 2
        # In each wave both owners tell whether they failed.
        told = 0 if row["label"] == "everywhere" else 8 * row["waves"]
        assert row["sent_bytes"] == row["formula_bytes"] + told
        # Processes agree once, and each wave exchanges twice; everywhere, nothing goes back.
        legs = 1 if row["label"] == "everywhere" else 2
        assert row["collectives"] == 1 + legs * row["waves"]


def test_temporaries_are_bounded_by_the_plan(results: list[Any]) -> None:
    ours = [row for row in results[0].rows if row["source"] == "steepest"]
    assert any(row["bucket_bytes"] and row["waves"] > 1 for row in ours)
    for row in ours:
        assert 0 < row["temporary_bytes"] <= row["planned_bytes"]


def test_loads_are_even_where_there_are_enough_matrices(results: list[Any]) -> None:
    assert [(row["model"], row["processes"]) for row in results[1].rows] == list(PLANS[:2])
    for model, world in PLANS:
        row = _load(model, world)
        assert row["per_process"] >= 8
        assert row["balance"] <= 1.02


def test_other_packages_are_left_out_without_peers() -> None:
    assert {case.source for case in cases(toy=True, peers=False)} == {"steepest"}


def test_it_runs_only_if_it_is_named() -> None:
    assert SECTIONS.keys() >= ON_REQUEST
    assert bench(["tiny"], ["lion"], sections=["machine"], rounds=1).settings["sections"] == ["machine"]


def test_a_failed_process_is_a_row_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("process 1 of 2 failed: no port")

    monkeypatch.setattr(sharded, "run_processes", fail)
    steps = next(SECTIONS["sharded"].run(config(), sharded.Callback()))
    assert [row["reason"] for row in steps.rows] == ["RuntimeError: process 1 of 2 failed: no port"]


def test_too_few_devices_are_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    on_cuda = replace(config(), device=torch.device("cuda"))
    steps = next(SECTIONS["sharded"].run(on_cuda, sharded.Callback()))
    assert [row["reason"] for row in steps.rows] == ["needs 2 devices, there are 1"]
