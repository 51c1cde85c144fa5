from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from steepest.lab.bench import Setting, bench
from steepest.lab.bench.families import families
from steepest.lab.bench.material import Material
from steepest.lab.bench.sections import offload as module
from steepest.lab.bench.sections.offload import Offload, copies, rows_of
from steepest.lab.bench.shapes import shape_list, tiny
from steepest.lab.bench.watch import Silent

from .made_up import setting

CPU = torch.device("cpu")


def asked(**given: Any) -> Setting:
    chosen = families(["lion", "adamw", "muon"], compiled=False, peers=False)
    return replace(setting(*chosen), **given)


def test_on_a_cpu_there_is_nothing_to_offload_and_it_says_so() -> None:
    (result,) = bench(["tiny"], ["lion"], sections=["offload"], rounds=1).results
    assert result.rows == []
    assert result.notes == [
        "Parameters are in the host's memory here: there is nothing to offload. --device cuda measures it."
    ]
    # Of matrix rules the state stays where the products are.
    assert bench(["tiny"], ["muon"], sections=["offload"], rounds=1).results == []


def test_each_step_is_held_against_the_host_and_the_copies() -> None:
    rows = rows_of(tiny(), asked())
    assert {row["label"]: row["state_bytes"] // tiny().numel for row in rows} == {"lion": 4, "adamw": 8}
    for row in rows:
        assert (row["status"], row["rounds"]) == ("ok", 2)
        assert min(row["step_ms"], row["host_ms"], row["copies_ms"], row["copies_rate"]) > 0


def test_the_overlap_is_taken_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that takes as long as the host alone, 3 s to the copies' 1: all of the copies are hidden."""
    time = 0.0

    def now(device: torch.device) -> float:
        nonlocal time
        time += 1
        return time

    monkeypatch.setattr(module, "now", now)
    (row,) = rows_of(tiny(), replace(asked(), families=families(["lion"], compiled=False, peers=False)))
    assert (row["step_ms"], row["host_ms"], row["copies_ms"]) == (1000.0, 1000.0, 1000.0)
    assert row["overlap"] == row["of_bound"] == 1.0


def test_copies_move_what_an_offloaded_step_moves() -> None:
    material = Material.of(tiny().tensors, CPU, torch.float32)
    before = [param.detach().clone() for _, param in material.params]
    move = copies(material)
    material.params[0][1].data.zero_()
    move()
    # What came down went up again.
    assert torch.equal(material.params[0][1], torch.zeros_like(before[0]))
    assert torch.equal(material.params[1][1], before[1])


def test_a_failure_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made = module.ours

    def ours(rule: str, how: Any, **given: Any) -> Any:
        entry = made(rule, how, **given)

        def refuse(params: object) -> Any:
            raise RuntimeError("no pinned memory")

        return replace(entry, make=refuse) if rule == "adamw" else entry

    monkeypatch.setattr(module, "ours", ours)
    reasons = {row["label"]: row["reason"] for row in rows_of(tiny(), asked())}
    assert reasons == {"lion": "", "adamw": "RuntimeError: no pinned memory"}


def test_what_does_not_fit_is_skipped_with_the_memory_that_it_needs() -> None:
    there = asked(device=torch.device("meta"), models=[shape_list("gpt2-124m")], memory=1 << 29)
    assert Offload().pieces(there) == 1
    (result,) = Offload().run(there, Silent())
    assert result.rows == []
    assert result.notes == ["skipped: needs 0.9 GiB on the device, there are 0.5 GiB"]
