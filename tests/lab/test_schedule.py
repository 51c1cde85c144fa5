from __future__ import annotations

import pytest
import torch

from steepest.lab import schedule


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_the_schedule_rises_to_the_peak_then_falls_to_the_floor(steps: int) -> None:
    factors = [schedule.factor(step, steps) for step in range(steps)]
    warmup = schedule.warmup_steps(steps)
    assert max(factors) == factors[warmup - 1] == 1.0
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert steps == 1 or factors[-1] == pytest.approx(schedule.FLOOR)
    assert min(factors) > 0


def test_every_param_group_keeps_its_own_peak() -> None:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups)
    scheduler = schedule.warmup_cosine(optimizer, 10)
    seen = []
    for _ in range(10):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    expected = [schedule.factor(step, 10) for step in range(10)]
    assert [first for first, _ in seen] == pytest.approx(expected)
    assert [second for _, second in seen] == pytest.approx([0.1 * factor for factor in expected])
