from __future__ import annotations

import torch

from steepest.lab.bench.entry import ours
from steepest.lab.bench.families import Family
from steepest.lab.bench.sections.host import NUMEL, Host
from steepest.lab.bench.shapes import tiny
from steepest.lab.bench.watch import Silent

from .made_up import failing, peer, setting


def run(*entries, scope="element"):
    return list(Host().run(setting(Family("made up", scope, "all", entries)), Silent()))


def test_everybody_steps_small_tensors_as_many_as_the_model_has():
    seen: list[list[torch.Size]] = []
    (result,) = run(
        ours("lion", "eager"), peer("watched", lambda params: seen.append([p.shape for p in params]))
    )
    assert [row["label"] for row in result.rows] == ["lion", "watched"]
    assert all(row["warm_ms"] > 0 and row["cold_ms"] > 0 and row["reason"] == "" for row in result.rows)
    assert all(shapes == [torch.Size([NUMEL])] * len(tiny().tensors) for shapes in seen)
    # Two to begin with; in turns of its own, and in others after a pass over memory.
    assert len(seen) > 2 + 2 * 2


def test_a_graph_has_no_hosts_part():
    (result,) = run(ours("lion", "eager"), ours("lion", "graph"))
    assert [row["how"] for row in result.rows] == ["eager"]


def test_who_fails_at_once_or_later_has_a_reason_and_the_others_go_on():
    count = iter(range(1000))

    def fall(params):
        if next(count) == 3:
            raise RuntimeError("fell")

    (result,) = run(
        failing("never made", ValueError("no such thing")), peer("fell", fall), ours("lion", "eager")
    )
    reasons = [row["reason"] for row in result.rows]
    assert reasons == ["ValueError: no such thing", "RuntimeError: fell", ""]
    assert [row.get("cold_ms") is None for row in result.rows] == [True, True, False]


def test_matrix_rules_have_no_table():
    assert run(ours("muon", "eager"), scope="matrix") == []
    assert Host().pieces(setting(Family("made up", "matrix", "all", (ours("muon", "eager"),)))) == 0
