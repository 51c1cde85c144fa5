from __future__ import annotations

import torch

from steepest.lab.bench.callbacks import Callback
from steepest.lab.bench.case import ours
from steepest.lab.bench.groups import Group
from steepest.lab.bench.sections.host import NUMEL, Host
from steepest.lab.bench.shapes import tiny

from .fakes import config, failing, peer


def run(*cases, scope="element"):
    return list(Host().run(config(Group("made up", scope, "all", cases)), Callback()))


def test_every_case_updates_the_models_number_of_small_tensors():
    seen: list[list[torch.Size]] = []
    (result,) = run(
        ours("lion", "eager"), peer("recorded", lambda params: seen.append([p.shape for p in params]))
    )
    assert [row["label"] for row in result.rows] == ["lion", "recorded"]
    assert all(row["warm_ms"] > 0 and row["cold_ms"] > 0 and row["reason"] == "" for row in result.rows)
    assert all(shapes == [torch.Size([NUMEL])] * len(tiny().tensors) for shapes in seen)
    # Two warm-up steps, then steps with warm caches and after flushing the caches.
    assert len(seen) > 2 + 2 * 2


def test_graphs_are_omitted():
    (result,) = run(ours("lion", "eager"), ours("lion", "graph"))
    assert [row["how"] for row in result.rows] == ["eager"]


def test_failures_have_a_reason_and_the_others_continue():
    count = iter(range(1000))

    def fail_later(params):
        if next(count) == 3:
            raise RuntimeError("failed")

    (result,) = run(
        failing("never constructed", ValueError("unknown")),
        peer("failing", fail_later),
        ours("lion", "eager"),
    )
    reasons = [row["reason"] for row in result.rows]
    assert reasons == ["ValueError: unknown", "RuntimeError: failed", ""]
    assert [row.get("cold_ms") is None for row in result.rows] == [True, True, False]


def test_matrix_rules_have_no_table():
    assert run(ours("muon", "eager"), scope="matrix") == []
    assert Host().work_units(config(Group("made up", "matrix", "all", (ours("muon", "eager"),)))) == 0
