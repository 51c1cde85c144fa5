"""Simba-leaky follows its equations with the given noise, and its counters are what they claim to be."""

import pytest
import torch

from reference import sign
from reference.compare import SHAPE, STEPS, assert_follows
from reference.gradients import hard_gradients
from reference.noise import leaky_noise
from steepest import Simba, SimbaLeaky


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("leak", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("common", [{}, {"weight_decay": 0.3, "maximize": True, "seed": 7}])
def test_with_the_noise_given(leak, common, dtype):
    assert_follows(
        "simba_leaky",
        sign.SimbaLeaky,
        {"lr": 3e-3, "leak": leak, **common},
        dtype=dtype,
        noise=leaky_noise(SHAPE, seed=common.get("seed", 0)),
    )


def test_the_second_tensor_has_noise_of_its_own():
    params = [torch.nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64)) for _ in range(2)]
    optimizer = SimbaLeaky(params, lr=1.0, seed=3)
    references = [
        sign.SimbaLeaky([0.0] * 48, lr=1.0, noise=leaky_noise(SHAPE, seed=3, ordinal=i)) for i in (0, 1)
    ]
    for gradient in hard_gradients(SHAPE, STEPS):
        for param, reference in zip(params, references, strict=True):
            param.grad = gradient.clone()
            reference.step(gradient.flatten().tolist())
        optimizer.step()
    counts = [optimizer.state[param]["counts"] for param in params]
    for ours, reference in zip(counts, references, strict=True):
        assert ours.flatten().tolist() == reference.s
    assert not torch.equal(*counts)


def test_leak_of_simba_is_the_same_optimizer():
    one, other = (torch.nn.Parameter(torch.zeros(SHAPE)) for _ in range(2))
    a, b = Simba([one], lr=0.5, leak=0.05), SimbaLeaky([other], lr=0.5, leak=0.05)
    for gradient in hard_gradients(SHAPE, STEPS):
        one.grad, other.grad = gradient.float(), gradient.float()
        a.step()
        b.step()
    assert torch.equal(one, other)
    assert torch.equal(a.state[one]["counts"], b.state[other]["counts"])


def constant_votes(count, numel, leak, seed=0):
    """Counters after ``count`` gradients of 0.29 rms everywhere, and what they should be on average."""
    param = torch.nn.Parameter(torch.zeros(numel + 1))
    optimizer = SimbaLeaky([param], leak=leak, seed=seed)
    # One large element sets the rms; all others vote 8·0.29 = 2.32, which is never an integer.
    gradient = torch.full((numel + 1,), 0.29)
    gradient[-1] = (numel + 1 - numel * 0.29**2) ** 0.5
    expected = 0.0
    for _ in range(count):
        param.grad = gradient.clone()
        optimizer.step()
        expected = expected * (1 - leak) + 8 * 0.29
    return optimizer.state[param]["counts"][:-1].double(), expected


@pytest.mark.parametrize(("steps", "leak"), [(1, 0.01), (40, 0.01), (30, 0.2)])
def test_the_counters_expectation_is_the_leaky_mean(steps, leak):
    counts, expected = constant_votes(steps, 30_000, leak)
    error = counts.std() / len(counts) ** 0.5
    assert abs(float(counts.mean()) - expected) < 5 * float(error)
    # Rounding noise only: at most variance ¼ for each of two roundings a step, forgotten like the rest.
    assert float(counts.var()) < 0.5 / (1 - (1 - leak) ** 2) + 0.1


def test_nothing_leaks_from_an_empty_counter_and_zero_does_not_vote():
    param = torch.nn.Parameter(torch.zeros(1000))
    optimizer = SimbaLeaky([param], lr=1.0)
    param.grad = torch.zeros(1000)
    param.grad[0] = 1.0
    for _ in range(50):
        optimizer.step()
    assert not optimizer.state[param]["counts"][1:].any()
    assert not param[1:].any()


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_counters_stop_at_the_limit_of_int16(side):
    param = torch.nn.Parameter(torch.zeros(100))
    optimizer = SimbaLeaky([param], lr=1.0, leak=1e-9)
    param.grad = torch.zeros(100)
    param.grad[0] = side  # 10 rms, clipped to 7: 56 a step
    optimizer.step()
    assert optimizer.state[param]["counts"][0].item() == 56 * side
    optimizer.state[param]["counts"][0] = int(32_700 * side)
    for _ in range(4):
        optimizer.step()
        assert side * optimizer.state[param]["counts"][0].item() in (32_756, 32_767)
        assert side * param[0].item() < 0
