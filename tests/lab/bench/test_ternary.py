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
from steepest.lab.bench.shapes import model_shapes
from steepest.ternary import TernaryLinear, flipping, pack

from .fakes import config

LAYERS = ["dense", "unpack, then matmul", "frozen weights", "votes by sign", "votes by magnitude"]
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


def fail(*arguments: object, **options: object) -> Any:
    raise RuntimeError("not today")


def test_a_quick_run_has_both_tables_at_toy_sizes(tmp_path: Path) -> None:
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


def test_every_row_has_a_finite_value_in_every_column() -> None:
    for result in run():
        for row in result.rows:
            for column in result.columns:
                value = row[column.key]
                assert isinstance(value, str) or 0 < value < float("inf")


def test_ratios_and_rates_are_consistent() -> None:
    layers, passes = run()
    assert [row["times_dense"] for row in layers.rows if row["label"] == "dense"] == [1.0, 1.0]
    by_label = {row["label"]: row for row in passes.rows}
    assert by_label["axpy"]["of_axpy"] == by_label["copy"]["of_copy"] == 1.0
    for row in passes.rows:
        per_second = row["gigabytes_per_second"]
        assert per_second == pytest.approx(row["bytes_per_weight"] / row["ns_per_weight"])
    # In float32 axpy moves 3 numbers and AdamW 7; packed weights take 1/4 byte, votes and counters 1 byte.
    expected = [12, 2, 1.25, 1.25, 1.25, 1.25, 3.5, 5.5, 3.5, 3.5, 28]
    assert [by_label[label]["bytes_per_weight"] for label in PASSES] == expected


def test_unpack_then_matmul_equals_the_ternary_layer() -> None:
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
    """The trainers constructed during the test."""
    made: list[Any] = []

    class Recorded(ternary.TernaryFlip):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(ternary, "TernaryFlip", Recorded)
    return made


@pytest.mark.parametrize("kind", ["sign", "magnitude"])
def test_a_layers_timer_votes_once_per_run(kind: str, trainers: list[Any]) -> None:
    timer = ternary.layers(ternary.LayerSize(16, 8), CPU, torch.float32)[f"votes by {kind}"]()
    (flip,) = trainers
    for _ in range(3):
        timer.setup()
        assert not any(buffer.passes for buffer in flip.targets.buffers.values())
        timer.run()
        (buffer,) = flip.targets.buffers.values()
        assert (buffer.kind, buffer.passes, bool(buffer.pending.any())) == (kind, 1, True)


def test_the_flip_step_flips(trainers: list[Any]) -> None:
    timer = ternary.passes(16, CPU, torch.float32)["flip step"]().timer
    threshold = int(trainers[0].stats().threshold)
    values = trainers[0].targets.layers[""].unpack()
    for _ in range(threshold):
        timer.setup()
        timer.run()
    stats = trainers[0].stats()
    # Every weight gets the same vote each time, so all that can move flip in the same step.
    moved = (trainers[0].targets.layers[""].unpack() != values).sum()
    assert stats.step == threshold
    assert 0 < stats.flips == moved < stats.weights


def test_the_limit_on_flips_applies_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = ternary.passes(64, CPU, torch.float32)["flip, at most 0.1 %"]().timer
    chosen = []
    first = flipping.flip_top_k
    monkeypatch.setattr(flipping, "flip_top_k", lambda *a, **k: chosen.append(k) or first(*a, **k))
    for _ in range(2):
        timer.setup()
        timer.run()
    assert [each["at_most"] for each in chosen] == [4, 4]
    assert all(4 < each["reached"] < 64 for each in chosen)


@pytest.mark.skipif(not compiler_available("cpu"), reason="needs a C++ compiler")
def test_pack_and_unpack_passes_are_correct() -> None:
    made = {label: make() for label, make in ternary.passes(16, CPU, torch.float32).items()}
    values = made["unpack"].timer.run()
    for how in ("", ", compiled"):
        assert torch.equal(made[f"pack{how}"].timer.run(), pack(values))
        assert torch.equal(made[f"unpack{how}"].timer.run(), values)
    assert set(values.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(made["copy"].timer.run(), values)


def test_the_callers_generator_does_not_change() -> None:
    before = torch.get_rng_state()
    run()
    assert torch.equal(before, torch.get_rng_state())


def test_a_failure_has_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ternary.UnpackThenMatmul, "forward", fail)
    monkeypatch.setattr(ternary.TernaryLinear, "set_ternary", fail)
    layers, passes = run()
    for result, label in ((layers, "unpack, then matmul"), (passes, "flip step")):
        failed = [row for row in result.rows if row["status"] == "failed"]
        assert {row["label"] for row in failed} == {label}
        assert {row["reason"] for row in failed} == {"RuntimeError: not today"}
        assert not any("ms" in row for row in failed)
        assert all(row["ms"] > 0 for row in result.rows if row not in failed)


def test_without_its_reference_a_ratio_is_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ternary.nn.Linear, "forward", fail)
    monkeypatch.setattr(ternary, "axpy", fail)
    layers, passes = run()
    alive = [row for row in layers.rows if row["label"] != "dense"]
    assert {row["times_dense"] for row in alive} == {None}
    rows = {row["label"]: row for row in passes.rows}
    assert rows["axpy"]["status"] == "failed"
    assert rows["pack"]["of_axpy"] is None
    assert rows["pack"]["of_copy"] > 0


def test_a_memory_shortage_skips_the_measurement_with_a_note() -> None:
    layers, passes = run(memory=1e-5)
    assert layers.rows == passes.rows == []
    assert sum("skipped: needs" in note for note in layers.notes) == len(section.TOY_SIZES)
    assert ["skipped: needs" in note for note in passes.notes] == [True]


def test_an_interrupt_keeps_finished_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_sizes_are_toys_only_if_all_models_are() -> None:
    toy = config()
    large = replace(toy, models=[model_shapes("gpt2-124m")])
    both = replace(toy, models=[model_shapes("tiny"), model_shapes("gpt2-124m")])
    assert [each.toy for each in (toy, large, both)] == [True, False, False]
    work_units = SECTIONS["ternary"].work_units
    assert [work_units(each) for each in (toy, large)] == [len(section.TOY_SIZES) + 1, len(section.SIZES) + 1]


def test_bfloat16_is_supported() -> None:
    layers, passes = run(dtype="bfloat16")
    assert {row["status"] for row in [*layers.rows, *passes.rows]} == {"ok"}
    assert passes.rows[0]["bytes_per_weight"] == 6


@pytest.mark.gpu
def test_on_cuda_every_row_is_measured() -> None:
    for result in run(device="cuda"):
        assert {row["status"] for row in result.rows} == {"ok"}
