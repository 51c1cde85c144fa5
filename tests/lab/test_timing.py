from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from steepest.lab import Task, timing
from steepest.lab.contestant import enlist
from steepest.lab.plan import StepTimes


class Tape:
    """Optimizers that write down whose turn it is."""

    def __init__(self) -> None:
        self.turns: list[str] = []

    def entry(self, label: str) -> tuple[str, type[torch.optim.SGD]]:
        tape = self

        class Recorded(torch.optim.SGD):
            def step(self, closure: object = None) -> None:  # type: ignore[override]
                tape.turns.append(label)

        return label, Recorded


def test_optimizers_take_turns_and_none_is_always_first(plane: Task[Tensor]) -> None:
    tape = Tape()
    contestants = enlist([tape.entry("a"), tape.entry("b"), tape.entry("c")], plane.make(0))
    times = timing.measure(plane, contestants, seconds=0.0)
    assert times.rounds == timing.LEAST_ROUNDS
    rounds = [tape.turns[at : at + 3] for at in range(0, len(tape.turns), 3)]
    assert len(rounds) == timing.LEAST_ROUNDS + timing.WARMUP_ROUNDS
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert [one[0] for one in rounds[:4]] == ["a", "b", "c", "a"]


def test_rounds_go_on_for_as_long_as_they_may(plane: Task[Tensor]) -> None:
    times = timing.measure(plane, enlist("signgsd", plane.make(0)), seconds=60.0)
    assert times.rounds == timing.MOST_ROUNDS


def test_the_shared_weights_hardly_move(plane: Task[Tensor]) -> None:
    model = plane.make(0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    timing.measure(replace(plane, make=lambda seed: model), enlist(["adamw", "signgsd"], model), seconds=0.0)
    for parameter, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), was, rtol=0, atol=1e-3)
        assert not torch.equal(parameter, was)


def test_times_are_plausible_and_leave_no_trace(plane: Task[Tensor]) -> None:
    model = plane.make(0)
    built: list[nn.Module] = []

    def make(seed: int) -> nn.Module:
        built.append(model)
        return model

    before = torch.get_rng_state()
    times = timing.measure(
        Task("t", make, plane.batches, plane.loss, plane.evaluate),
        enlist(["adamw", "lion"], model),
        seconds=0.05,
    )
    assert torch.equal(before, torch.get_rng_state())
    assert len(built) == 1
    for label in ("adamw", "lion"):
        low, high = times.optimizer_ms_quartiles[label]
        assert 0 < low <= times.optimizer_ms[label] <= high
    assert times.gradient_ms > 0
    assert times.evaluation_seconds > 0
    assert 1e3 * times.step_seconds > times.gradient_ms


def test_the_calmer_measurement_is_the_one_with_the_faster_gradient() -> None:
    calm = StepTimes(9, 10.0, {"a": 1.0, "b": 3.0}, {}, 0.1)
    busy = StepTimes(9, 30.0, {"a": 9.0, "b": 3.0}, {}, 0.3)
    assert calm.calmer(busy) is busy.calmer(calm) is calm
    assert calm.step_seconds == pytest.approx(0.012)
