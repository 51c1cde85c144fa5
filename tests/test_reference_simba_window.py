"""Simba's integers: the cutoff ⌊wγ⌋, and windows up to the counters' limit."""

import pytest
import torch

from reference.sign import cutoff
from steepest import Simba
from steepest.rule import find_rule


@pytest.mark.parametrize(
    ("window", "threshold", "expected"),
    [
        (100, 0.29, 29),
        (128, 0.1, 12),
        (100, 0.57, 57),
        (10, 0.7, 7),
        (1000, 0.001, 1),
        (9, 0.1, 0),
        (50, 1.0, 50),
    ],
)
def test_the_counter_decides_exactly_above_the_cutoff(window, threshold, expected):
    # Ones drive the counter up by one a step; one opposite gradient then shows who decides.
    for count in (expected, expected + 1):
        if count > window:
            continue
        param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = Simba([param], lr=1.0, window_size=window, threshold=threshold)
        param.grad = torch.ones(1, dtype=torch.float64)
        for _ in range(count):
            optimizer.step()
        before = param.item()
        param.grad = -torch.ones(1, dtype=torch.float64)
        optimizer.step()
        assert param.item() - before == (-1.0 if count > expected else 1.0)


def test_cutoff_is_exact_for_every_percent():
    rule = find_rule("simba")
    for window in range(1, 301):
        for percent in range(101):
            threshold = percent / 100
            ours = rule.scalars(1, window_size=window, threshold=threshold, betas=(0.9, 0.99))["cutoff"]
            assert ours == cutoff(window, threshold), (window, threshold)


def test_int8_counters_saturate_without_wrapping():
    param = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = Simba([param], lr=1.0, window_size=126, threshold=0.5, counter_dtype=torch.int8)
    position, count = 0.0, 0
    for t in range(800):
        sign = 1 if t < 300 or t >= 700 else -1
        position -= (1 if count > 0 else -1) if abs(count) > 63 else sign
        count = max(-126, min(126, count + sign))
        param.grad = torch.tensor([sign, -sign], dtype=torch.float64)
        optimizer.step()
        assert optimizer.state[param]["counts"].tolist() == [count, -count], t
        assert param.tolist() == [position, -position], t
    assert count == -26


@pytest.mark.parametrize("side", [1, -1])
def test_int16_counters_saturate_without_wrapping(side):
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Simba([param], lr=1.0, window_size=32766, threshold=0.5)
    param.grad = torch.full((1,), float(side), dtype=torch.float64)
    optimizer.step()
    optimizer.state[param]["counts"].fill_(side * 32700)
    for t in range(1, 200):
        optimizer.step()
        assert optimizer.state[param]["counts"].item() == side * min(32766, 32700 + t)
    assert param.item() == -side * 200


@pytest.mark.parametrize(("dtype", "largest"), [(torch.int8, 126), (torch.int16, 32766)])
def test_windows_beyond_the_counters_are_refused(dtype, largest):
    params = [torch.nn.Parameter(torch.zeros(1))]
    Simba(params, window_size=largest, counter_dtype=dtype)
    for window in (largest + 1, largest + 2, 10 * largest):
        with pytest.raises(ValueError, match=f"window_size.*{largest}.*{window}"):
            Simba(params, window_size=window, counter_dtype=dtype)


@pytest.mark.parametrize(
    "bad", [{"window_size": 0}, {"window_size": 2.5}, {"threshold": -0.1}, {"threshold": 1.1}]
)
def test_senseless_windows_and_thresholds_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Simba([torch.nn.Parameter(torch.zeros(1))], **bad)


def test_default_window_does_not_fit_int8():
    with pytest.raises(ValueError, match="window_size"):
        Simba([torch.nn.Parameter(torch.zeros(1))], counter_dtype=torch.int8)
