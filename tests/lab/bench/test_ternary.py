from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steepest.compile.available import compiler_available
from steepest.lab import cli
from steepest.lab.bench import Record, Result, bench, ternary
from steepest.lab.bench.sections import SECTIONS
from steepest.lab.bench.sections import ternary as section
from steepest.lab.bench.shapes import shape_list
from steepest.ternary import TernaryLinear, flipping, pack

from .made_up import setting

LAYERS = ["dense", "unpack, then matmul", "weights that stay", "votes by sign", "votes by magnitude"]
PASSES = [
    "axpy",
    "copy",
    "pack",
    "pack, compiled",
    "unpack",
    "unpack, compiled",
    "flip",
    "flip, int16 counters",
    "flip, at most 0.1 %",
    "flip step",
    "AdamW, fused",
]
CPU = torch.device("cpu")


def run(**options: Any) -> list[Result]:
    return bench(["tiny"], ["lion"], sections=["ternary"], rounds=2, **options).results


def refuse(*arguments: object, **options: object) -> Any:
    raise RuntimeError("not today")


def test_on_the_command_line_both_tables_come_at_toy_sizes(tmp_path: Path) -> None:
    arguments = ["bench", "--quick", "--sections", "ternary", "--threads", "1", "--out", str(tmp_path)]
    assert cli.run(arguments) == 0
    record = Record.load(tmp_path / "bench.json")
    layers, passes = record.results
    assert record.machine["threads"] == 1
    assert {result.section for result in record.results} == {"ternary"}
    sizes = [(size.width, size.rows) for size in section.TOY_SIZES]
    assert [(row["width"], row["rows"], row["label"]) for row in layers.rows] == [
        (*size, label) for size in sizes for label in LAYERS
    ]
    assert [row["label"] for row in passes.rows] == PASSES
    for row in [*layers.rows, *passes.rows]:
        assert (row["status"], row["reason"], row["rounds"]) == ("ok", "", 3)
        assert row["quartiles_ms"][0] <= row["ms"] <= row["quartiles_ms"][1]
    keys = [row["key"] for row in layers.rows]
    assert len(set(keys)) == len(keys)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| 32 | 4 | votes by sign |" in text
    assert "Passes over 64 × 64 ternary weights" in text


def test_every_column_is_a_key_of_every_row_and_all_is_finite() -> None:
    for result in run():
        for row in result.rows:
            for column in result.columns:
                value = row[column.key]
                assert isinstance(value, str) or 0 < value < float("inf")


def test_ratios_rates_and_shares_belong_together() -> None:
    layers, passes = run()
    assert [row["times_dense"] for row in layers.rows if row["label"] == "dense"] == [1.0, 1.0]
    by_label = {row["label"]: row for row in passes.rows}
    assert by_label["axpy"]["of_axpy"] == by_label["copy"]["of_copy"] == 1.0
    for row in passes.rows:
        per_second = row["gigabytes_per_second"]
        assert per_second == pytest.approx(row["bytes_per_weight"] / row["ns_per_weight"])
    # Float32: axpy reads two and writes one, AdamW seven; T is a quarter of a byte, votes and counters one.
    expected = [12, 2, 1.25, 1.25, 1.25, 1.25, 3.5, 5.5, 3.5, 3.5, 28]
    assert [by_label[label]["bytes_per_weight"] for label in PASSES] == expected


def test_the_layer_that_unpacks_in_the_graph_computes_what_ours_does() -> None:
    x, dy = torch.randn(5, 16, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    layer = TernaryLinear(16, 8, bias=False, dtype=torch.float64)
    found = []
    for module in (layer, ternary.UnpackThenMatmul(layer)):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        y = module(leaf)
        y.backward(dy)
        found.append((y.detach(), leaf.grad, layer.scale.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All that are made in the test."""
    made: list[Any] = []

    class Seen(ternary.TernaryFlip):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(ternary, "TernaryFlip", Seen)
    return made


@pytest.mark.parametrize("kind", ["sign", "magnitude"])
def test_a_turn_of_a_layer_votes_once_by_its_kind(kind: str, trainers: list[Any]) -> None:
    turn = ternary.layers(ternary.LayerSize(16, 8), CPU, torch.float32)[f"votes by {kind}"]()
    (flip,) = trainers
    for _ in range(3):
        turn.ready()
        assert not flip.has_votes
        turn.act()
        (buffer,) = flip._vote_buffers.values()
        assert (buffer.kind, buffer.casts, bool(buffer.pending.any())) == (kind, 1, True)


def test_the_flip_step_flips(trainers: list[Any]) -> None:
    turn = ternary.passes(16, CPU, torch.float32)["flip step"]().turn
    threshold = int(trainers[0].threshold())
    values = trainers[0].layers[""].unpack()
    for _ in range(threshold):
        turn.ready()
        turn.act()
    stats = trainers[0].stats()
    # Every weight has got the same vote each time: all flip in the same step, but those at their bound.
    moved = (trainers[0].layers[""].unpack() != values).sum()
    assert stats.step == threshold
    assert 0 < stats.flips == moved < stats.weights


def test_the_limit_bites_in_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = ternary.passes(64, CPU, torch.float32)["flip, at most 0.1 %"]().turn
    chosen = []
    first = flipping.flip_first
    monkeypatch.setattr(flipping, "flip_first", lambda *a, **k: chosen.append(k) or first(*a, **k))
    for _ in range(2):
        turn.ready()
        turn.act()
    assert [each["at_most"] for each in chosen] == [4, 4]
    assert all(4 < each["reached"] < 64 for each in chosen)


@pytest.mark.skipif(not compiler_available("cpu"), reason="needs a C++ compiler")
def test_packing_packs() -> None:
    made = {label: make() for label, make in ternary.passes(16, CPU, torch.float32).items()}
    values = made["unpack"].turn.act()
    for how in ("", ", compiled"):
        assert torch.equal(made[f"pack{how}"].turn.act(), pack(values))
        assert torch.equal(made[f"unpack{how}"].turn.act(), values)
    assert set(values.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(made["copy"].turn.act(), values)


def test_the_callers_generator_stays_as_it_was() -> None:
    before = torch.get_rng_state()
    run()
    assert torch.equal(before, torch.get_rng_state())


def test_one_that_fails_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ternary.UnpackThenMatmul, "forward", refuse)
    monkeypatch.setattr(ternary.TernaryLinear, "set_ternary", refuse)
    layers, passes = run()
    for result, label in ((layers, "unpack, then matmul"), (passes, "flip step")):
        failed = [row for row in result.rows if row["status"] == "failed"]
        assert {row["label"] for row in failed} == {label}
        assert {row["reason"] for row in failed} == {"RuntimeError: not today"}
        assert not any("ms" in row for row in failed)
        assert all(row["ms"] > 0 for row in result.rows if row not in failed)


def test_without_what_it_is_held_against_a_ratio_is_left_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ternary.nn.Linear, "forward", refuse)
    monkeypatch.setattr(ternary, "axpy", refuse)
    layers, passes = run()
    alive = [row for row in layers.rows if row["label"] != "dense"]
    assert {row["times_dense"] for row in alive} == {None}
    rows = {row["label"]: row for row in passes.rows}
    assert rows["axpy"]["status"] == "failed"
    assert rows["pack"]["of_axpy"] is None
    assert rows["pack"]["of_copy"] > 0


def test_what_does_not_fit_is_skipped_and_says_so() -> None:
    layers, passes = run(memory=1e-5)
    assert layers.rows == passes.rows == []
    assert sum("skipped: needs" in note for note in layers.notes) == len(section.TOY_SIZES)
    assert ["skipped: needs" in note for note in passes.notes] == [True]


def test_an_interrupt_keeps_the_sizes_that_were_done(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = section._layer_rows

    def once(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(section, "_layer_rows", once)
    record = bench(["tiny"], ["lion"], sections=["ternary"], rounds=1)
    assert record.interrupted
    assert [len(result.rows) for result in record.results] == [len(LAYERS)]


def test_sizes_are_toys_only_where_the_models_are() -> None:
    toy = setting()
    large = replace(toy, models=[shape_list("gpt2-124m")])
    both = replace(toy, models=[shape_list("tiny"), shape_list("gpt2-124m")])
    assert [each.toy for each in (toy, large, both)] == [True, False, False]
    pieces = SECTIONS["ternary"].pieces
    assert [pieces(each) for each in (toy, large)] == [len(section.TOY_SIZES) + 1, len(section.SIZES) + 1]


def test_bfloat16_is_measured_too() -> None:
    layers, passes = run(dtype="bfloat16")
    assert {row["status"] for row in [*layers.rows, *passes.rows]} == {"ok"}
    assert passes.rows[0]["bytes_per_weight"] == 6


@pytest.mark.gpu
def test_on_cuda_every_row_is_measured() -> None:
    for result in run(device="cuda"):
        assert {row["status"] for row in result.rows} == {"ok"}
