from __future__ import annotations

from typing import Any

import pytest
import torch

from steepest.lab.bench import compare as module
from steepest.lab.bench.bandwidth import copy, copy_bytes
from steepest.lab.bench.case import Case, ours
from steepest.lab.bench.compare import compare
from steepest.lab.bench.groups import Group, select_groups
from steepest.lab.bench.memory import batch_by_memory, planned_state_bytes
from steepest.lab.bench.params import SharedParams
from steepest.lab.bench.shapes import model_shapes, tiny
from steepest.lab.clock import now

from .fakes import config, failing, peer


def rows_by_label(*cases: Case, scope: Any = "element", **options: Any) -> dict[str, dict[str, Any]]:
    group = Group("made up", scope, "all" if scope == "element" else "hidden", cases)
    return {row["label"]: row for row in compare(group, tiny(), config(group, **options))}


@pytest.mark.parametrize(
    ("case", "least"),
    [
        (ours("signgsd", "eager"), 12),
        (ours("signum", "eager"), 20),
        (ours("lion", "eager"), 20),
        (ours("sgd", "eager", momentum=0.9), 20),
        (ours("adamw", "eager"), 28),
        (ours("simba", "eager", counter_dtype=torch.int8, window_size=100), 14),
        (ours("simba", "eager"), 16),
    ],
    ids=lambda value: value.key if isinstance(value, Case) else str(value),
)
def test_the_least_bytes_of_a_step(case: Case, least: int) -> None:
    rows = rows_by_label(case)
    # The step count per tensor adds less than a hundredth of a byte per parameter.
    assert rows[case.label]["least_per_parameter"] == pytest.approx(least, abs=0.02)
    assert rows["axpy"]["least_per_parameter"] == 12


@pytest.mark.parametrize(
    "case",
    {e.label: e for g in select_groups(peers=False, compiled=False) for e in g.cases}.values(),
    ids=lambda case: case.label,
)
def test_planned_state_equals_actual_state(case: Case) -> None:
    tensors = tiny().hidden(1)
    shared = SharedParams.create(tensors, torch.device("cpu"), torch.float32)
    optimizer: Any = case.make(shared.params)
    shared.set_grads()
    optimizer.step()
    planned = planned_state_bytes(case, tensors, torch.float32)
    assert planned in (optimizer.state_bytes(), None)
    assert planned is not None or case.rule == "hyperball"


def test_a_failing_peer_has_a_row_and_the_others_are_measured() -> None:
    rows = rows_by_label(
        ours("sgd", "eager"),
        failing("broken", RuntimeError("broken\nbadly")),
        failing("absent", ModuleNotFoundError("No module named 'nobody'", name="nobody")),
        peer("sound"),
    )
    assert (rows["broken"]["status"], rows["broken"]["reason"]) == ("failed", "RuntimeError: broken badly")
    assert (rows["absent"]["status"], rows["absent"]["reason"]) == (
        "not installed",
        "nobody is not installed",
    )
    assert rows["sound"]["status"] == rows["sgd"]["status"] == "ok"
    assert "step_ms" not in rows["broken"]


def test_a_peer_that_fails_later_has_a_row_too() -> None:
    calls = []

    def fail_later(params: object) -> None:
        calls.append(1)
        if len(calls) > 5:
            raise RuntimeError("tired")

    rows = rows_by_label(ours("sgd", "eager"), peer("weak", fail_later))
    assert (rows["weak"]["status"], rows["weak"]["reason"]) == ("failed", "RuntimeError: tired")
    assert rows["sgd"]["status"] == "ok"


def test_an_invalid_step_is_not_timed() -> None:
    def undo(params: list[torch.Tensor]) -> None:
        for param, was in zip(params, initial.params, strict=True):
            param.data.copy_(was[1])

    def spoil(params: list[torch.Tensor]) -> None:
        params[0].data.fill_(float("nan"))

    initial = SharedParams.create(tiny().tensors, torch.device("cpu"), torch.float32)
    rows = rows_by_label(peer("idle", undo))
    assert "did not change the parameters" in rows["idle"]["reason"]
    assert rows["idle"]["status"] == "failed"
    assert "infinite or NaN" in rows_by_label(peer("spoiler", spoil))["spoiler"]["reason"]


def test_gradients_that_a_peer_removes_are_restored() -> None:
    steps = []

    def remove_grads(params: list[torch.Tensor]) -> None:
        steps.append(all(param.grad is not None for param in params))
        for param in params:
            param.grad = None

    assert rows_by_label(ours("sgd", "eager"), peer("remover", remove_grads))["remover"]["status"] == "ok"
    assert all(steps)
    assert len(steps) > 5


def test_only_a_step_that_keeps_the_gradients_is_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    def remove_grads(params: list[torch.Tensor]) -> None:
        params[-1].grad = None

    repeatable: dict[str, bool] = {}
    original = module._prepare

    def prepare(case: Case, *arguments: Any) -> Any:
        one = original(case, *arguments)
        repeatable[case.label] = one.repeatable
        return one

    monkeypatch.setattr(module, "_prepare", prepare)
    rows_by_label(ours("sgd", "eager"), peer("remover", remove_grads))
    assert repeatable == {"sgd": True, "remover": False}


def test_on_cuda_timers_are_queued_and_only_peers_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a device: its tensors, clock and profiler are the CPU's."""
    cpu, create = torch.device("cpu"), SharedParams.create
    profile, time = module.profile_step, module.time_interleaved
    queued: dict[str, bool] = {}

    def time_interleaved(timers: Any, *arguments: Any) -> Any:
        queued.update({timer.label: timer.queued for timer in timers})
        return time(timers, *arguments)

    def remove_grads(params: list[torch.Tensor]) -> None:
        params[-1].grad = None

    monkeypatch.setattr(
        module.SharedParams, "create", lambda tensors, device, dtype: create(tensors, cpu, dtype)
    )
    monkeypatch.setattr(module, "profile_step", lambda step, device, **options: profile(step, cpu, **options))
    monkeypatch.setattr(module, "now", lambda device: now(cpu))
    monkeypatch.setattr(module, "time_interleaved", time_interleaved)
    monkeypatch.setattr(module, "try_capture", lambda step, device: f"tried on {device}")
    rows = rows_by_label(ours("sgd", "eager"), peer("remover", remove_grads), device="cuda")
    assert list(queued.values()) == [True, True, True, False]
    assert (rows["sgd"]["graph"], rows["remover"]["graph"]) == ("", "tried on cuda")


def test_a_step_with_grads_restores_the_gradients() -> None:
    has_grads: list[bool] = []

    def remove_grads(params: list[torch.Tensor]) -> None:
        has_grads.append(all(param.grad is not None for param in params))
        params[0].grad = None

    shared = SharedParams.create(tiny().tensors, torch.device("cpu"), torch.float32)
    case = peer("remover", remove_grads)
    group = Group("made up", "element", "all", (case,))
    one = module._prepare(case, group, shared, torch.device("cpu"))
    step = module._step_with_grads(one, shared)
    step()
    step()
    assert all(has_grads)


def test_an_eager_step_is_not_reported_as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("lion", "lion", "steepest", "compiled", ours("lion", "eager").make)
    row = rows_by_label(case)["lion"]
    assert row["status"] == "eager only"
    assert "step_ms" not in row


class Clock:
    """A clock whose every reading takes a second, and a `slow` peer whose steps take nine more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = 0.0
        monkeypatch.setattr(module, "now", self.read)

    def read(self, device: torch.device) -> float:
        self.time += 1
        return self.time

    def slow(self, rule: str) -> Case:
        def wait(params: object) -> None:
            self.time += 9

        return peer("slow", wait, rule=rule)


def test_a_peer_is_compared_with_steepests_case_of_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rows = rows_by_label(
        clock.slow("lion"), ours("sgd", "eager"), ours("lion", "eager"), ours("lion", "eager", "b")
    )
    assert rows["slow"]["times_ours"] == 10.0
    assert rows["lion"]["times_ours"] is rows["sgd"]["times_ours"] is None
    assert rows["b"]["times_ours"] == 1.0


def test_of_limit_is_axpys_time_for_the_least_bytes_over_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_by_label(ours("lion", "eager"), Clock(monkeypatch).slow("lion"))
    assert rows["lion"]["step_ms"] == rows["axpy"]["step_ms"] == 1000.0
    assert rows["lion"]["limit_ms"] == rows["slow"]["limit_ms"] == pytest.approx(1000 * 20 / 12)
    assert rows["lion"]["of_limit"] == pytest.approx(20 / 12)
    assert rows["slow"]["of_limit"] == pytest.approx(2 / 12)
    assert rows["axpy"]["of_limit"] == 1.0


def test_of_copy_is_copys_time_for_the_least_bytes_over_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_by_label(ours("lion", "eager"), Clock(monkeypatch).slow("lion"))
    assert rows["lion"]["of_copy"] == pytest.approx(20 / 8)
    assert rows["slow"]["of_copy"] == pytest.approx(2 / 8)
    assert rows["axpy"]["of_copy"] == pytest.approx(12 / 8)


def test_copy_overwrites_the_parameters_with_the_gradients() -> None:
    shared = SharedParams.create(tiny().tensors, torch.device("cpu"), torch.float32)
    copy(shared)
    assert all(torch.equal(p, g) for (_, p), g in zip(shared.params, shared.grads, strict=True))
    assert copy_bytes(shared) == 8 * tiny().numel


@pytest.mark.parametrize(
    ("rule", "scope"), [("adamw", "element"), ("sgd_sai", "element"), ("muon", "matrix")]
)
def test_a_graph_is_captured_and_its_replay_is_timed(
    rule: str, scope: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {"replays": 0}

    def capture_graph(step: Any, device: torch.device) -> Any:
        group = step.__self__.param_groups[0]
        seen.update(capturable=group["capturable"], lr=group["lr"], step=step)

        def replay() -> None:
            seen["replays"] += 1
            step()

        return replay

    monkeypatch.setattr(module, "capture_graph", capture_graph)
    row = rows_by_label(ours(rule, "graph"), scope=scope, rounds=3)[rule]
    assert (row["status"], row["how"], row["rounds"]) == ("ok", "graph", 3)
    assert seen["capturable"] is True
    assert isinstance(seen["lr"], torch.Tensor)
    assert seen["lr"].item() == pytest.approx(1e-3)
    # Once under the profiler, and at least once in each of three rounds and two warm-up rounds.
    assert seen["replays"] >= 1 + 5
    assert row["temporary_bytes"] is None
    assert (row["products"] is not None) == (scope == "matrix")


def test_a_failed_capture_or_replay_has_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "capture_graph", lambda step, device: lambda: None)
    row = rows_by_label(ours("lion", "graph"))["lion"]
    assert (row["status"], row["reason"]) == ("failed", "InvalidStep: a replay did not change the parameters")

    def refuse(step: Any, device: torch.device) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(module, "capture_graph", refuse)
    rows = rows_by_label(ours("lion", "eager"), ours("lion", "graph", "held"))
    assert rows["lion"]["status"] == "ok"
    assert rows["held"]["reason"] == "RuntimeError: operation not permitted when stream is capturing"


def test_a_matrix_rules_limit_is_the_time_of_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    row = rows_by_label(ours("muon", "eager"), scope="matrix")["muon"]
    # Every product and every step takes a second.
    assert row["limited_by"] == "products"
    assert row["limit_ms"] == 1000.0 * sum(row["products"].values()) > 1000.0
    assert row["of_limit"] == sum(row["products"].values())


def test_a_matrix_step_without_visible_products_has_no_limit() -> None:
    rows = rows_by_label(ours("muon", "eager"), peer("opaque", rule="muon"), scope="matrix")
    assert rows["opaque"]["limit_ms"] is rows["opaque"]["of_limit"] is None


def test_a_case_that_does_not_fit_into_memory_is_planned() -> None:
    copy = 4 * tiny().numel
    rows = rows_by_label(ours("signgsd", "eager"), ours("adamw", "eager"), memory=int(3.5 * copy))
    assert rows["signgsd"]["status"] == "ok"
    assert rows["adamw"]["status"] == "planned"
    assert rows["adamw"]["state_bytes"] == pytest.approx(2 * copy, rel=0.01)
    assert "the limit is" in rows["adamw"]["reason"]
    rows = rows_by_label(ours("signgsd", "eager"), memory=copy)
    assert [row["status"] for row in rows.values()] == ["planned"]


def test_batches_contain_the_reference_and_every_case_that_fits_beside_it() -> None:
    cases = [ours("lion", "eager", label) for label in "abcdefg"]
    needs = dict(zip([e.key for e in cases], [2, 3, 3, 3, 1, 9, 7], strict=True))
    batches, too_large = batch_by_memory(cases, needs, 8)
    assert [[e.label for e in batch] for batch in batches] == [["a", "b", "c"], ["a", "d", "e"]]
    # g would fit alone, but not together with the reference.
    assert sorted(e.label for e in too_large) == ["f", "g"]


def test_cases_of_several_batches_have_one_row_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "estimated_bytes", lambda case, tensors, dtype: 1 << 20)
    cases = [ours("sgd", "eager"), *(peer(label) for label in "abc")]
    group = Group("made up", "element", "all", tuple(cases))
    rows = compare(group, tiny(), config(group, memory=(5 << 19) + 8 * tiny().numel))
    assert [row["label"] for row in rows] == ["axpy", "sgd", "a", "b", "c"]
    assert all(row["status"] == "ok" for row in rows)


def test_attention_groups_update_only_attention_matrices() -> None:
    group = Group("made up", "matrix", "attention", (ours("quad", "eager"),))
    names = [tensor.name for tensor in group.tensors(model_shapes("gpt2-124m"), 1)]
    assert names == ["h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight"]


def test_least_bytes_use_our_state_also_for_peers() -> None:
    def hoard(params: list[torch.Tensor]) -> None:
        hoarder.state[params[0]] = {"all": torch.zeros(1 << 20)}

    def make(params: Any) -> torch.optim.Optimizer:
        nonlocal hoarder
        hoarder = peer("hoarder", hoard, rule="simba").make(params)
        return hoarder

    hoarder: Any = None
    rows = rows_by_label(
        ours("simba", "eager", "int16"),
        ours("simba", "eager", "int8", counter_dtype=torch.int8, window_size=100),
        Case("simba", "hoarder", "a peer", "default", make),
    )
    least = {label: round(row["least_per_parameter"], 1) for label, row in rows.items()}
    assert least == {"axpy": 12.0, "int16": 16.0, "int8": 14.0, "hoarder": 16.0}
    assert rows["hoarder"]["state_bytes"] == 4 << 20
