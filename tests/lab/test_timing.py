from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from steepest.lab import Task, timing
from steepest.lab.optimizer_spec import resolve_optimizers
from steepest.lab.plan import StepTimes


class StepLog:
    """Creates optimizers that log the order of their steps."""

    def __init__(self) -> None:
        self.labels: list[str] = []

    def entry(self, label: str) -> tuple[str, type[torch.optim.SGD]]:
        log = self

        class Recorded(torch.optim.SGD):
            def step(self, closure: object = None) -> None:  # type: ignore[override]
                log.labels.append(label)

        return label, Recorded


def test_optimizers_take_turns_in_a_rotating_order(plane: Task[Tensor]) -> None:
    log = StepLog()
    specs = resolve_optimizers([log.entry("a"), log.entry("b"), log.entry("c")], plane.make(0))
    times = timing.measure(plane, specs, seconds=0.0)
    assert times.rounds == timing.MIN_ROUNDS
    rounds = [log.labels[at : at + 3] for at in range(0, len(log.labels), 3)]
    assert len(rounds) == timing.MIN_ROUNDS + timing.WARMUP_ROUNDS
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert [one[0] for one in rounds[:4]] == ["a", "b", "c", "a"]


def test_rounds_continue_until_the_time_or_the_maximum_is_reached(plane: Task[Tensor]) -> None:
    times = timing.measure(plane, resolve_optimizers("signgsd", plane.make(0)), seconds=60.0)
    assert times.rounds == timing.MAX_ROUNDS


def test_the_shared_weights_hardly_change(plane: Task[Tensor]) -> None:
    model = plane.make(0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    timing.measure(
        replace(plane, make=lambda seed: model), resolve_optimizers(["adamw", "signgsd"], model), seconds=0.0
    )
    for parameter, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), was, rtol=0, atol=1e-3)
        assert not torch.equal(parameter, was)


def test_times_are_plausible_and_timing_has_no_side_effects(plane: Task[Tensor]) -> None:
    model = plane.make(0)
    built: list[nn.Module] = []

    def make(seed: int) -> nn.Module:
        built.append(model)
        return model

    before = torch.get_rng_state()
    times = timing.measure(
        Task("t", make, plane.batches, plane.loss, plane.evaluate),
        resolve_optimizers(["adamw", "lion"], model),
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


def test_the_measurement_with_the_faster_gradient_is_less_noisy() -> None:
    quiet = StepTimes(9, 10.0, {"a": 1.0, "b": 3.0}, {}, 0.1)
    noisy = StepTimes(9, 30.0, {"a": 9.0, "b": 3.0}, {}, 0.3)
    assert quiet.less_noisy(noisy) is noisy.less_noisy(quiet) is quiet
    assert quiet.step_seconds == pytest.approx(0.012)
