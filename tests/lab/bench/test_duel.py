from __future__ import annotations

from typing import Any

import pytest
import torch

from steepest.lab.bench import duel as module
from steepest.lab.bench.duel import duel
from steepest.lab.bench.entry import Entry, ours
from steepest.lab.bench.families import Family, families
from steepest.lab.bench.limits import copy, copy_bytes
from steepest.lab.bench.material import Material
from steepest.lab.bench.room import packed, planned_state_bytes
from steepest.lab.bench.shapes import shape_list, tiny
from steepest.lab.clock import now

from .made_up import failing, peer, setting


def face(*entries: Entry, scope: Any = "element", **given: Any) -> dict[str, dict[str, Any]]:
    """The rows by label."""
    family = Family("made up", scope, "all" if scope == "element" else "hidden", entries)
    return {row["label"]: row for row in duel(family, tiny(), setting(family, **given))}


@pytest.mark.parametrize(
    ("entry", "least"),
    [
        (ours("signgsd", "eager"), 12),
        (ours("signum", "eager"), 20),
        (ours("lion", "eager"), 20),
        (ours("sgd", "eager", momentum=0.9), 20),
        (ours("adamw", "eager"), 28),
        (ours("simba", "eager", counter_dtype=torch.int8, window_size=100), 14),
        (ours("simba", "eager"), 16),
    ],
    ids=lambda value: value.key if isinstance(value, Entry) else str(value),
)
def test_the_least_bytes_of_a_step(entry: Entry, least: int) -> None:
    rows = face(entry)
    # A step count per tensor is not a byte per parameter.
    assert rows[entry.label]["least_per_parameter"] == pytest.approx(least, abs=0.02)
    assert rows["axpy"]["least_per_parameter"] == 12


@pytest.mark.parametrize(
    "entry",
    {e.label: e for f in families(peers=False, compiled=False) for e in f.entries}.values(),
    ids=lambda entry: entry.label,
)
def test_planned_state_is_what_is_kept(entry: Entry) -> None:
    tensors = tiny().hidden(1)
    material = Material.of(tensors, torch.device("cpu"), torch.float32)
    optimizer: Any = entry.make(material.params)
    material.lend_gradients()
    optimizer.step()
    planned = planned_state_bytes(entry, tensors, torch.float32)
    assert planned in (optimizer.state_bytes(), None)
    assert planned is not None or entry.rule == "hyperball"


def test_a_peer_that_fails_is_a_row_and_the_others_are_measured() -> None:
    rows = face(
        ours("sgd", "eager"),
        failing("broken", RuntimeError("of no use\nat all")),
        failing("absent", ModuleNotFoundError("No module named 'nobody'", name="nobody")),
        peer("sound"),
    )
    assert (rows["broken"]["status"], rows["broken"]["reason"]) == (
        "failed",
        "RuntimeError: of no use at all",
    )
    assert (rows["absent"]["status"], rows["absent"]["reason"]) == (
        "not installed",
        "nobody is not installed",
    )
    assert rows["sound"]["status"] == rows["sgd"]["status"] == "ok"
    assert "step_ms" not in rows["broken"]


def test_a_peer_that_fails_later_is_a_row_too() -> None:
    calls = []

    def tire(params: object) -> None:
        calls.append(1)
        if len(calls) > 5:
            raise RuntimeError("tired")

    rows = face(ours("sgd", "eager"), peer("weak", tire))
    assert (rows["weak"]["status"], rows["weak"]["reason"]) == ("failed", "RuntimeError: tired")
    assert rows["sgd"]["status"] == "ok"


def test_a_step_that_is_none_is_not_timed() -> None:
    def undo(params: list[torch.Tensor]) -> None:
        for param, was in zip(params, at_first.params, strict=True):
            param.data.copy_(was[1])

    def spoil(params: list[torch.Tensor]) -> None:
        params[0].data.fill_(float("nan"))

    at_first = Material.of(tiny().tensors, torch.device("cpu"), torch.float32)
    rows = face(peer("idle", undo))
    assert "moved nothing" in rows["idle"]["reason"]
    assert rows["idle"]["status"] == "failed"
    assert "infinite or NaN" in face(peer("spoiler", spoil))["spoiler"]["reason"]


def test_a_peer_that_takes_its_gradients_away_gets_them_again() -> None:
    steps = []

    def take_away(params: list[torch.Tensor]) -> None:
        steps.append(all(param.grad is not None for param in params))
        for param in params:
            param.grad = None

    assert face(ours("sgd", "eager"), peer("taker", take_away))["taker"]["status"] == "ok"
    assert all(steps)
    assert len(steps) > 5


def test_only_what_leaves_the_gradients_may_be_repeated_without_being_made_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def take_away(params: list[torch.Tensor]) -> None:
        params[-1].grad = None

    made: dict[str, bool] = {}
    prepared = module._prepared

    def look(entry: Entry, *given: Any) -> Any:
        one = prepared(entry, *given)
        made[entry.label] = one.repeats
        return one

    monkeypatch.setattr(module, "_prepared", look)
    face(ours("sgd", "eager"), peer("taker", take_away))
    assert made == {"sgd": True, "taker": False}


def test_on_cuda_turns_are_queued_and_only_peers_are_tried_to_be_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if there were a device: its tensors, its clock and its profiler are the CPU's."""
    cpu, of, look, take = torch.device("cpu"), Material.of, module.observe, module.take_turns
    queued: dict[str, bool] = {}

    def take_turns(turns: Any, *given: Any) -> Any:
        queued.update(
            {turn.label.split(":")[-2] if ":" in turn.label else turn.label: turn.queued for turn in turns}
        )
        return take(turns, *given)

    def take_away(params: list[torch.Tensor]) -> None:
        params[-1].grad = None

    monkeypatch.setattr(module.Material, "of", lambda tensors, device, dtype: of(tensors, cpu, dtype))
    monkeypatch.setattr(module, "observe", lambda act, device, **given: look(act, cpu, **given))
    monkeypatch.setattr(module, "now", lambda device: now(cpu))
    monkeypatch.setattr(module, "take_turns", take_turns)
    monkeypatch.setattr(module, "capture", lambda step, device: f"tried on {device}")
    rows = face(ours("sgd", "eager"), peer("taker", take_away), device="cuda")
    assert queued == {"axpy": True, "copy": True, "sgd": True, "taker": False}
    assert (rows["sgd"]["graph"], rows["taker"]["graph"]) == ("", "tried on cuda")


def test_what_is_tried_to_be_captured_is_a_step_with_gradients() -> None:
    there: list[bool] = []

    def take_away(params: list[torch.Tensor]) -> None:
        there.append(all(param.grad is not None for param in params))
        params[0].grad = None

    material = Material.of(tiny().tensors, torch.device("cpu"), torch.float32)
    entry = peer("taker", take_away)
    family = Family("made up", "element", "all", (entry,))
    one = module._prepared(entry, family, material, torch.device("cpu"))
    step = module._whole(one, material)
    step()
    step()
    assert all(there)


def test_what_runs_eagerly_is_not_called_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry("lion", "lion", "steepest", "compiled", ours("lion", "eager").make)
    row = face(entry)["lion"]
    assert row["status"] == "eager only"
    assert "step_ms" not in row


class Clock:
    """Every reading takes a second of its own, and steps of a `slow` peer nine more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = 0.0
        monkeypatch.setattr(module, "now", self.read)

    def read(self, device: torch.device) -> float:
        self.time += 1
        return self.time

    def slow(self, rule: str) -> Entry:
        def wait(params: object) -> None:
            self.time += 9

        return peer("slow", wait, rule=rule)


def test_a_peer_is_compared_with_ours_of_its_equation(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rows = face(clock.slow("lion"), ours("sgd", "eager"), ours("lion", "eager"), ours("lion", "eager", "b"))
    assert rows["slow"]["times_ours"] == 10.0
    assert rows["lion"]["times_ours"] is rows["sgd"]["times_ours"] is None
    assert rows["b"]["times_ours"] == 1.0


def test_the_share_of_the_limit_is_axpys_time_for_the_least_bytes_over_the_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = face(ours("lion", "eager"), Clock(monkeypatch).slow("lion"))
    assert rows["lion"]["step_ms"] == rows["axpy"]["step_ms"] == 1000.0
    assert rows["lion"]["limit_ms"] == rows["slow"]["limit_ms"] == pytest.approx(1000 * 20 / 12)
    assert rows["lion"]["of_limit"] == pytest.approx(20 / 12)
    assert rows["slow"]["of_limit"] == pytest.approx(2 / 12)
    assert rows["axpy"]["of_limit"] == 1.0


def test_the_share_of_copy_is_the_least_bytes_in_copys_time_over_the_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = face(ours("lion", "eager"), Clock(monkeypatch).slow("lion"))
    assert rows["lion"]["of_copy"] == pytest.approx(20 / 8)
    assert rows["slow"]["of_copy"] == pytest.approx(2 / 8)
    assert rows["axpy"]["of_copy"] == pytest.approx(12 / 8)


def test_copying_writes_the_gradients_over_the_parameters() -> None:
    material = Material.of(tiny().tensors, torch.device("cpu"), torch.float32)
    copy(material)
    assert all(torch.equal(p, g) for (_, p), g in zip(material.params, material.grads, strict=True))
    assert copy_bytes(material) == 8 * tiny().numel


@pytest.mark.parametrize(
    ("rule", "scope"), [("adamw", "element"), ("sgd_sai", "element"), ("muon", "matrix")]
)
def test_a_graph_is_captured_when_all_is_measured_and_its_replay_is_timed(
    rule: str, scope: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {"replays": 0}

    def captured(step: Any, device: torch.device) -> Any:
        group = step.__self__.param_groups[0]
        seen.update(capturable=group["capturable"], lr=group["lr"], step=step)

        def replay() -> None:
            seen["replays"] += 1
            step()

        return replay

    monkeypatch.setattr(module, "captured", captured)
    row = face(ours(rule, "graph"), scope=scope, rounds=3)[rule]
    assert (row["status"], row["how"], row["rounds"]) == ("ok", "graph", 3)
    assert seen["capturable"] is True
    assert isinstance(seen["lr"], torch.Tensor)
    assert seen["lr"].item() == pytest.approx(1e-3)
    # Once looked into, and in three rounds and two of warm-up at least.
    assert seen["replays"] >= 1 + 5
    assert row["temporary_bytes"] is None
    assert (row["products"] is not None) == (scope == "matrix")


def test_a_graph_that_cannot_be_captured_or_does_nothing_is_a_row_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "captured", lambda step, device: lambda: None)
    row = face(ours("lion", "graph"))["lion"]
    assert (row["status"], row["reason"]) == ("failed", "NoStep: a replay moved nothing")

    def refuse(step: Any, device: torch.device) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(module, "captured", refuse)
    rows = face(ours("lion", "eager"), ours("lion", "graph", "held"))
    assert rows["lion"]["status"] == "ok"
    assert rows["held"]["reason"] == "RuntimeError: operation not permitted when stream is capturing"


def test_a_matrix_rule_is_held_against_its_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    row = face(ours("muon", "eager"), scope="matrix")["muon"]
    # Every product and every step takes a second, and the step computes so many of them.
    assert row["limited_by"] == "products"
    assert row["limit_ms"] == 1000.0 * sum(row["products"].values()) > 1000.0
    assert row["of_limit"] == sum(row["products"].values())


def test_a_matrix_step_whose_products_are_not_seen_has_no_limit() -> None:
    rows = face(ours("muon", "eager"), peer("opaque", rule="muon"), scope="matrix")
    assert rows["opaque"]["limit_ms"] is rows["opaque"]["of_limit"] is None


def test_what_does_not_fit_is_planned_and_says_so() -> None:
    copy = 4 * tiny().numel
    rows = face(ours("signgsd", "eager"), ours("adamw", "eager"), memory=int(3.5 * copy))
    assert rows["signgsd"]["status"] == "ok"
    assert rows["adamw"]["status"] == "planned"
    assert rows["adamw"]["state_bytes"] == pytest.approx(2 * copy, rel=0.01)
    assert "the limit is" in rows["adamw"]["reason"]
    rows = face(ours("signgsd", "eager"), memory=copy)
    assert [row["status"] for row in rows.values()] == ["planned"]


def test_packs_hold_what_fits_beside_the_lead_and_lose_nobody() -> None:
    entries = [ours("lion", "eager", label) for label in "abcdefg"]
    needs = dict(zip([e.key for e in entries], [2, 3, 3, 3, 1, 9, 7], strict=True))
    packs, left = packed(entries, needs, 8)
    assert [[e.label for e in pack] for pack in packs] == [["a", "b", "c"], ["a", "d", "e"]]
    # g would fit alone, but not beside the lead that it is to be compared with.
    assert sorted(e.label for e in left) == ["f", "g"]


def test_contestants_of_several_packs_have_one_row_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "need", lambda entry, tensors, dtype: 1 << 20)
    entries = [ours("sgd", "eager"), *(peer(label) for label in "abc")]
    family = Family("made up", "element", "all", tuple(entries))
    rows = duel(family, tiny(), setting(family, memory=(5 << 19) + 8 * tiny().numel))
    assert [row["label"] for row in rows] == ["axpy", "sgd", "a", "b", "c"]
    assert all(row["status"] == "ok" for row in rows)


def test_attention_families_step_attention_alone() -> None:
    family = Family("made up", "matrix", "attention", (ours("quad", "eager"),))
    names = [tensor.name for tensor in family.tensors(shape_list("gpt2-124m"), 1)]
    assert names == ["h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight"]


def test_each_of_ours_is_held_to_its_own_state_and_a_peer_to_that_of_ours() -> None:
    def hoard(params: list[torch.Tensor]) -> None:
        hoarder.state[params[0]] = {"all": torch.zeros(1 << 20)}

    def make(params: Any) -> torch.optim.Optimizer:
        nonlocal hoarder
        hoarder = peer("hoarder", hoard, rule="simba").make(params)
        return hoarder

    hoarder: Any = None
    rows = face(
        ours("simba", "eager", "int16"),
        ours("simba", "eager", "int8", counter_dtype=torch.int8, window_size=100),
        Entry("simba", "hoarder", "a peer", "default", make),
    )
    least = {label: round(row["least_per_parameter"], 1) for label, row in rows.items()}
    assert least == {"axpy": 12.0, "int16": 16.0, "int8": 14.0, "hoarder": 16.0}
    assert rows["hoarder"]["state_bytes"] == 4 << 20
