from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from steepest.lab.records import Metric
from steepest.lab.tasks.task import Task
from steepest.lab.training import timing
from steepest.lab.training.optimizers import OptimizerSpec
from steepest.lab.training.timing import Timing, interleave, training_costs

CPU = torch.device("cpu")


class Clock:
    """A clock that only calls of `take` advance, and a log of them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.log: list[str] = []

    def take(self, name: str, seconds: float) -> None:
        self.seconds += seconds
        self.log.append(name)

    def calls(self, **seconds: float) -> dict[str, Callable[[], object]]:
        return {name: partial(self.take, name, each) for name, each in seconds.items()}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "now", lambda device: clock.seconds)
    return clock


def test_calls_take_turns_in_a_rotating_order(clock: Clock) -> None:
    times = interleave(clock.calls(a=1.0, b=2.0, c=3.0), device=CPU, rounds=4)
    rounds = [clock.log[at : at + 3] for at in range(0, len(clock.log), 3)]
    assert rounds == [list(one) for one in ("abc", "bca", "cab", "abc", "bca", "cab")]
    assert {name: (each.median_ms, len(each.ms)) for name, each in times.items()} == {
        "a": (1000.0, 4),
        "b": (2000.0, 4),
        "c": (3000.0, 4),
    }


def test_warm_up_rounds_do_not_count(clock: Clock) -> None:
    durations = iter([9.0, 9.0, 1.0, 2.0, 4.0])
    times = interleave({"a": lambda: clock.take("a", next(durations))}, device=CPU, rounds=3)
    assert times["a"].ms == (1000.0, 2000.0, 4000.0)


def test_a_fast_call_is_repeated_and_its_time_is_the_mean(clock: Clock) -> None:
    times = interleave(clock.calls(fast=0.002, slow=0.1), device=CPU, rounds=3)
    assert clock.log.count("fast") == 1 + 5 * (timing.WARMUP_ROUNDS - 1 + 3)
    assert clock.log.count("slow") == timing.WARMUP_ROUNDS + 3
    assert times["fast"].median_ms == pytest.approx(2.0)


def test_the_setup_precedes_each_call_and_is_not_timed(clock: Clock) -> None:
    setup = {"a": partial(clock.take, "setup", 0.5)}
    times = interleave(clock.calls(a=0.001, b=0.001), device=CPU, rounds=2, setup=setup)
    assert times["a"].median_ms == pytest.approx(1.0)
    # The setup is long, so the call is not repeated; b is.
    assert clock.log.count("a") == clock.log.count("setup") == timing.WARMUP_ROUNDS + 2
    assert all(clock.log[at - 1] == "setup" for at, name in enumerate(clock.log) if name == "a")
    assert clock.log.count("b") > clock.log.count("a")


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 9), (20.0, 20), (1e9, timing.MAX_ROUNDS)])
def test_rounds_go_on_for_the_seconds_up_to_the_maximum(clock: Clock, seconds: float, rounds: int) -> None:
    assert len(interleave(clock.calls(a=1.0), device=CPU, seconds=seconds)["a"].ms) == rounds


def test_progress_ends_at_one(clock: Clock) -> None:
    seen: list[float] = []
    interleave(clock.calls(a=1.0), device=CPU, rounds=4, on_round=seen.append)
    assert seen == [0.25, 0.5, 0.75, 1.0]


def test_ratios_are_those_within_rounds() -> None:
    # The machine slows down tenfold: the medians' ratio would be 20 / 10.
    assert Timing((2.0, 20.0, 30.0)).ratio(Timing((1.0, 10.0, 10.0))) == 2.0
    assert Timing((2.0, 200.0)).ratio(Timing((1.0, 100.0))) == 2.0
    assert Timing((5.0,)).quartiles == (5.0, 5.0)
    assert Timing(tuple(map(float, range(1, 8)))).quartiles == (2.0, 6.0)


def make_task(make: Callable[[int], nn.Module]) -> Task[Tensor]:
    def batches(seed: int) -> Iterator[Tensor]:
        yield from torch.ones(3, 2, 4)

    return Task(
        name="plane",
        make=make,
        batches=batches,
        loss=lambda model, batch: model(batch).square().mean(),
        evaluate=lambda model, split: {"error": 0.0},
        metrics=(Metric(name="error"),),
    )


def spec(label: str, made: Callable[..., torch.optim.Optimizer], **options: float) -> OptimizerSpec:
    return OptimizerSpec(
        label, lambda model, values: made(model.parameters(), **options, **values), {"lr": 0.5}
    )


def test_training_costs_count_the_bytes_of_each_optimizer_on_one_model() -> None:
    built: list[nn.Module] = []

    def make(seed: int) -> nn.Module:
        built.append(nn.Linear(4, 100))
        return built[-1]

    before = torch.get_rng_state()
    costs = training_costs(
        make_task(make), [spec("sgd", torch.optim.SGD, momentum=0.9), spec("adamw", torch.optim.AdamW)], 0.0
    )
    assert torch.equal(before, torch.get_rng_state())
    assert len(built) == 1
    assert list(costs) == ["sgd", "adamw"]
    assert {(each.parameters, each.model) for each in costs.values()} == {(500, "plane")}
    # One float per parameter; two, and a float32 step count for each of the two tensors.
    assert [each.state_bytes for each in costs.values()] == [4 * 500, 2 * 4 * 500 + 2 * 4]
    for cost in costs.values():
        assert (cost.peak_bytes or 0) >= cost.state_bytes
        low, high = cost.optimizer_ms_quartiles or (0.0, 0.0)
        assert 0 < low <= (cost.optimizer_ms or 0) <= high
        assert (cost.gradient_ms or 0) > 0


def test_training_costs_step_with_fresh_gradients_at_a_thousandth_of_the_lr() -> None:
    model = nn.Linear(4, 1, bias=False)
    nn.init.ones_(model.weight)
    lrs: list[float] = []

    class Logged(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            lrs.append(self.param_groups[0]["lr"])
            # d/dw (w·1)² of the present weights: a stale gradient would differ.
            expected = 2 * model.weight.sum() * torch.ones(1, 4)
            torch.testing.assert_close(model.weight.grad, expected)
            super().step()

    training_costs(make_task(lambda seed: model), [spec("a", Logged), spec("b", Logged)], 0.0)
    assert set(lrs) == {0.5 * 1e-3}
