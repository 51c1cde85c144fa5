from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from steepest.lab.bench import BenchConfig, bench
from steepest.lab.bench.callbacks import Callback
from steepest.lab.bench.groups import select_groups
from steepest.lab.bench.params import SharedParams
from steepest.lab.bench.sections import offload as module
from steepest.lab.bench.sections.offload import Offload, copies, measure
from steepest.lab.bench.shapes import model_shapes, tiny

from .fakes import config

CPU = torch.device("cpu")


def offload_config(**options: Any) -> BenchConfig:
    groups = select_groups(["lion", "adamw", "muon"], compiled=False, peers=False)
    return replace(config(*groups), **options)


def test_on_a_cpu_a_note_says_that_there_is_nothing_to_offload() -> None:
    (result,) = bench(["tiny"], ["lion"], sections=["offload"], rounds=1).results
    assert result.rows == []
    assert result.notes == [
        "The parameters are in host memory, so there is nothing to offload. Use --device cuda."
    ]
    # Matrix rules do not support offload.
    assert bench(["tiny"], ["muon"], sections=["offload"], rounds=1).results == []


def test_each_step_is_compared_with_the_host_and_the_copies() -> None:
    rows = measure(tiny(), offload_config())
    assert {row["label"]: row["state_bytes"] // tiny().numel for row in rows} == {"lion": 4, "adamw": 8}
    for row in rows:
        assert (row["status"], row["rounds"]) == ("ok", 2)
        assert min(row["step_ms"], row["host_ms"], row["copies_ms"], row["copies_rate"]) > 0


def test_the_overlap_is_taken_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """All timers take the same time here, so the copies are entirely hidden."""
    time = 0.0

    def now(device: torch.device) -> float:
        nonlocal time
        time += 1
        return time

    monkeypatch.setattr(module, "now", now)
    (row,) = measure(
        tiny(), replace(offload_config(), groups=select_groups(["lion"], compiled=False, peers=False))
    )
    assert (row["step_ms"], row["host_ms"], row["copies_ms"]) == (1000.0, 1000.0, 1000.0)
    assert row["overlap"] == row["of_bound"] == 1.0


def test_copies_move_what_an_offloaded_step_moves() -> None:
    shared = SharedParams.create(tiny().tensors, CPU, torch.float32)
    before = [param.detach().clone() for _, param in shared.params]
    move = copies(shared)
    shared.params[0][1].data.zero_()
    move()
    # The copied value has been written back.
    assert torch.equal(shared.params[0][1], torch.zeros_like(before[0]))
    assert torch.equal(shared.params[1][1], before[1])


def test_a_failure_has_a_row_and_the_others_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.ours

    def ours(rule: str, how: Any, **options: Any) -> Any:
        case = original(rule, how, **options)

        def fail(params: object) -> Any:
            raise RuntimeError("no pinned memory")

        return replace(case, make=fail) if rule == "adamw" else case

    monkeypatch.setattr(module, "ours", ours)
    reasons = {row["label"]: row["reason"] for row in measure(tiny(), offload_config())}
    assert reasons == {"lion": "", "adamw": "RuntimeError: no pinned memory"}


def test_a_memory_shortage_skips_the_measurement_with_a_note() -> None:
    on_meta = offload_config(device=torch.device("meta"), models=[model_shapes("gpt2-124m")], memory=1 << 29)
    assert Offload().work_units(on_meta) == 1
    (result,) = Offload().run(on_meta, Callback())
    assert result.rows == []
    assert result.notes == ["skipped: needs 0.9 GiB on the device, there are 0.5 GiB"]
