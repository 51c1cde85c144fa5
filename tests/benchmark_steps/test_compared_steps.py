"""Cases of a group: what bounds a step, what a peer may do wrong, and what fits into memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks.steps import compare as module
from benchmarks.steps.case import Case, ours
from benchmarks.steps.compare import compare
from benchmarks.steps.config import BenchConfig
from benchmarks.steps.groups import Group, select_groups
from benchmarks.steps.memory import batch_by_memory
from benchmarks.steps.params import SharedParams

import steepest
from steepest.lab.errors import LabError
from steepest.lab.training import timing
from steepest.model_shapes import model_shapes

CPU = torch.device("cpu")
TINY = model_shapes("tiny")


class SGDWithCallback(torch.optim.SGD):
    """SGD that calls `callback` with its parameters after each step."""

    def __init__(self, params: Any, callback: Callable[[list[torch.Tensor]], object]) -> None:
        super().__init__(params, lr=1e-3)
        self.callback = callback

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        super().step()
        self.callback(self.param_groups[0]["params"])


def peer(
    label: str, callback: Callable[[list[torch.Tensor]], object] = lambda params: None, rule: str = "sgd"
) -> Case:
    def make(params: Any) -> torch.optim.Optimizer:
        return SGDWithCallback([param for _, param in params], callback)

    return Case(rule, label, "a peer", "default", make)


def failing(label: str, error: Exception) -> Case:
    def make(params: Any) -> torch.optim.Optimizer:
        raise error

    return Case("sgd", label, "a peer", "default", make)


def rows_by_label(*cases: Case, scope: Any = "element", memory: int = 1 << 30) -> dict[str, dict[str, Any]]:
    group = Group("made up", scope, "all" if scope == "element" else "hidden", cases)
    config = BenchConfig([TINY], [group], CPU, torch.float32, 2, 1, memory)
    return {row["label"]: row for row in compare(group, TINY, config)}


@pytest.mark.parametrize(
    ("case", "least"),
    [
        (ours("signgsd", "eager"), 12),
        (ours("lion", "eager"), 20),
        (ours("adamw", "eager"), 28),
        (ours("simba", "eager", counter_dtype=torch.int8, window_size=100), 14),
    ],
    ids=lambda value: value.key if isinstance(value, Case) else str(value),
)
def test_the_least_bytes_of_a_step(case: Case, least: int) -> None:
    rows = rows_by_label(case)
    # The step count per tensor adds less than a hundredth of a byte per parameter.
    assert rows[case.label]["least_per_parameter"] == pytest.approx(least, abs=0.02)
    assert rows["axpy"]["least_per_parameter"] == 12


def test_a_failing_peer_has_a_row_and_the_others_are_measured() -> None:
    rows = rows_by_label(
        ours("sgd", "eager"),
        failing("broken", RuntimeError("broken\nbadly")),
        failing("absent", ModuleNotFoundError("No module named 'nobody'", name="nobody")),
        peer("sound"),
    )
    assert (rows["broken"]["status"], rows["broken"]["reason"]) == ("failed", "RuntimeError: broken badly")
    assert rows["absent"]["reason"] == "nobody is not installed"
    assert rows["sound"]["status"] == rows["sgd"]["status"] == "ok"


def test_an_invalid_step_is_not_timed() -> None:
    def undo(params: list[torch.Tensor]) -> None:
        for param, was in zip(params, initial.params, strict=True):
            param.data.copy_(was[1])

    initial = SharedParams.create(TINY.tensors, CPU, torch.float32)
    idle = rows_by_label(peer("idle", undo))["idle"]
    assert (idle["status"], "step_ms" in idle) == ("failed", False)
    assert "did not change the parameters" in idle["reason"]
    spoiler = rows_by_label(peer("spoiler", lambda params: params[0].data.fill_(float("nan"))))["spoiler"]
    assert "infinite or NaN" in spoiler["reason"]
    eager = Case("lion", "lion", "steepest", "compiled", ours("lion", "eager").make)
    assert rows_by_label(eager)["lion"]["status"] == "eager only"


def test_gradients_that_a_peer_removes_are_there_in_every_step() -> None:
    steps = []

    def look(params: list[torch.Tensor]) -> None:
        steps.append(all(param.grad is not None for param in params))

    def remove_grads(params: list[torch.Tensor]) -> None:
        look(params)
        for param in params:
            param.grad = None

    rows = rows_by_label(ours("sgd", "eager"), peer("remover", remove_grads), peer("after", look))
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert all(steps)
    assert len(steps) > 10


class Clock:
    """A clock whose every reading takes 10 ms, so that nothing is repeated, and a peer that is slower."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = 0.0
        monkeypatch.setattr(timing, "now", self.read)

    def read(self, device: torch.device) -> float:
        self.time += 0.01
        return self.time

    def slow(self, rule: str) -> Case:
        def wait(params: object) -> None:
            self.time += 0.09

        return peer("slow", wait, rule)


def test_limits_and_ratios_follow_from_the_times_of_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rows = rows_by_label(clock.slow("lion"), ours("sgd", "eager"), ours("lion", "eager"))
    assert rows["slow"]["times_ours"] == pytest.approx(10)
    assert rows["lion"]["times_ours"] is rows["sgd"]["times_ours"] is None
    # Lion must move 20 bytes where axpy moves 12, and copy 8.
    assert rows["lion"]["step_ms"] == pytest.approx(10)
    assert rows["slow"]["limit_ms"] == pytest.approx(10 * 20 / 12)
    assert rows["slow"]["of_limit"] == pytest.approx(2 / 12)
    assert rows["slow"]["of_copy"] == pytest.approx(2 / 8)


def test_a_matrix_rules_limit_is_the_time_of_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    rows = rows_by_label(ours("muon", "eager"), peer("opaque", rule="muon"), scope="matrix")
    # Every product and every step takes 10 ms.
    assert rows["muon"]["limited_by"] == "products"
    assert rows["muon"]["of_limit"] == pytest.approx(sum(rows["muon"]["products"].values()))
    assert rows["opaque"]["limit_ms"] is rows["opaque"]["of_limit"] is None


def test_a_graph_is_captured_and_its_replay_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    replays = []

    def capture_graph(step: Any, device: torch.device) -> Any:
        return lambda: (replays.append(1), step())

    case = Case("lion", "lion", "steepest", "graph", ours("lion", "eager").make)
    monkeypatch.setattr(module, "capture_graph", capture_graph)
    row = rows_by_label(case)["lion"]
    assert (row["status"], row["how"], row["temporary_bytes"]) == ("ok", "graph", None)
    assert len(replays) >= 2 + timing.WARMUP_ROUNDS + 2
    monkeypatch.setattr(module, "capture_graph", lambda step, device: lambda: None)
    assert "a replay did not change" in rows_by_label(case)["lion"]["reason"]


def test_what_does_not_fit_into_memory_is_planned() -> None:
    copy = 4 * TINY.numel
    rows = rows_by_label(ours("signgsd", "eager"), ours("adamw", "eager"), memory=int(3.5 * copy))
    assert (rows["signgsd"]["status"], rows["adamw"]["status"]) == ("ok", "planned")
    # Two moments, and a float64 step count for each tensor.
    assert rows["adamw"]["state_bytes"] == 2 * copy + 8 * len(TINY.tensors)


def test_batches_contain_the_reference_and_every_case_that_fits_beside_it() -> None:
    cases = [ours("lion", "eager", label) for label in "abcdefg"]
    needs = dict(zip([e.key for e in cases], [2, 3, 3, 3, 1, 9, 7], strict=True))
    batches, too_large = batch_by_memory(cases, needs, 8)
    assert [[e.label for e in batch] for batch in batches] == [["a", "b", "c"], ["a", "d", "e"]]
    # g would fit alone, but not together with the reference.
    assert sorted(e.label for e in too_large) == ["f", "g"]


def test_every_optimizer_is_measured_eager_and_compiled_before_its_peers() -> None:
    groups = select_groups()
    cases = [case for group in groups for case in group.cases if case.ours]
    for name in sorted(set(steepest.list_optimizers()) - {"orthogonalized"}):
        assert {case.how for case in cases if case.rule == name} == {"eager", "compiled"}, name
    for group in groups:
        assert len({case.key for case in group.cases}) == len(group.cases)
        own = [case.ours for case in group.cases]
        assert own == sorted(own, reverse=True)
        assert {e.rule for e in group.cases if not e.ours} <= {e.rule for e in group.cases if e.ours}
    with pytest.raises(LabError, match=r"'lino'.*lion"):
        select_groups(["lino"])
