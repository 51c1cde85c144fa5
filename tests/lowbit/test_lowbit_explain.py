"""explain() says how every tensor's averages are stored, and why not in one byte."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import steepest
from loops import for_each


def _model() -> nn.Module:
    layers = [nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 50), nn.Linear(50, 100)]
    return nn.Sequential(*layers, nn.Linear(100, 8)).bfloat16()


def test_every_tensor_has_its_format_and_the_reason():
    optimizer = steepest.build(_model(), "lion", state_dtype="int8", master="split8")
    rows = {row.name: row for row in optimizer.explain().rows}
    assert {name: row.state for name, row in rows.items() if "weight" in name} == {
        "0.weight": "int8/64",
        "1.weight": "float32 (vector)",
        "2.weight": "int8/64",
        "3.weight": "int8/32",
        "4.weight": "float32 (rows of 50)",
        "5.weight": "float32 (800 elements)",
    }
    assert {row.master for row in rows.values()} == {"split8"}
    printed = str(optimizer.explain())
    assert "state" in printed.splitlines()[0]
    assert "master" in printed.splitlines()[0]


def test_a_view_that_cuts_columns_is_a_reason_too():
    weight = nn.Parameter(torch.zeros(64, 192))
    fused = {"w": steepest.views.columns(64, 128)}
    optimizer = steepest.Muon([("w", weight)], state_dtype="int8", views=fused)
    assert [row.state for row in optimizer.explain().rows] == ["float32 (view)"]
    optimizer = steepest.Muon([("w", weight)], state_dtype="int8", views={"w": steepest.views.rows(32, 32)})
    assert [row.state for row in optimizer.explain().rows] == ["int8/64"]


def test_the_least_memory_is_short_for_options_and_yields_to_them():
    stored = ("state_dtype", "master", "rounding")

    def options(model, **given):
        optimizer = steepest.build(model, "muon", memory="least", **given)
        return {tuple(group[name] for name in stored) for group in optimizer.param_groups}

    assert options(_model()) == {("int8", "split8", "stochastic")}
    assert options(_model().float()) == {("int8", None, "nearest")}
    assert options(_model(), master="split16") == {("int8", "split16", "stochastic")}
    assert options(_model(), fallback={"rule": "adamw", "state_dtype": torch.float32}) == {
        ("int8", "split8", "stochastic"),
        (torch.float32, "split8", "stochastic"),
    }
    with pytest.raises(ValueError, match="memory must be None or 'least', got 'low'"):
        steepest.build(_model(), memory="low")


def test_who_asked_for_neither_sees_no_columns_of_them():
    head = str(steepest.build(_model(), "lion").explain()).splitlines()[0]
    assert "state" not in head
    assert "master" not in head


@for_each(
    "options", [{"state_dtype": "int8"}, {"master": "split16"}, {"state_dtype": "int8", "master": "split8"}]
)
@for_each("rule", ["lion", "adamw", "muon", "sgd_sai", "quad"])
def test_the_bytes_shown_are_those_of_the_step(rule, options):
    model = _model()
    optimizer = steepest.build(model, rule, **options)
    shown = sum(row.state_bytes for row in optimizer.explain().rows)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state_bytes() == shown
