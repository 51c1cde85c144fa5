from __future__ import annotations

import pytest
import torch

from steepest.lab.training.schedule import Decay, Schedule


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_the_schedule_rises_to_the_peak_then_falls_to_the_floor(steps: int, decay: Decay) -> None:
    schedule = Schedule(decay, warmup=0.25, floor=0.125)
    factors = [schedule.factor(step, steps) for step in range(steps)]
    warmup = round(0.25 * steps)
    assert factors[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert factors[-1] == pytest.approx(1.0 if decay == "constant" else 0.125)
    assert 0 < min(factors) <= max(factors) <= 1


def test_half_way_down_both_decays_are_at_the_mean() -> None:
    for decay in ("cosine", "linear"):
        assert Schedule(decay, warmup=0.0, floor=0.5).factor(49, 100) == pytest.approx(0.75)  # type: ignore[arg-type]
    assert Schedule("linear", 0.0, 0.0).factor(24, 100) == pytest.approx(0.75)
    assert Schedule("cosine", 0.0, 0.0).factor(24, 100) == pytest.approx((1 + 0.5**0.5) / 2)


def test_every_param_group_keeps_its_own_peak() -> None:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups)
    schedule = Schedule()
    scheduler = schedule.attach(optimizer, 10)
    seen = []
    for _ in range(10):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    expected = [schedule.factor(step, 10) for step in range(10)]
    assert [first for first, _ in seen] == pytest.approx(expected)
    assert [second for _, second in seen] == pytest.approx([0.1 * factor for factor in expected])


def test_the_schedule_says_what_it_does() -> None:
    assert str(Schedule("linear", 0.25, 0.0)) == (
        "linear warm-up over 25% of the steps, then linear decay to 0% of the peak"
    )
    assert str(Schedule("constant", 0.0)) == "constant"
