"""SignGSD, Signum and Lion follow their equations, step by step."""

import pytest
import torch

from loops import for_each
from reference import sign
from reference.compare import assert_follows
from steepest import Lion, SignGSD, Signum

DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-2},
        {"lr": 1e-2, "weight_decay": 0.5},
        {"lr": 1e-2, "weight_decay": 1.7, "maximize": True},
        # A dyadic rate: weights that start at 0 come back to exactly 0, in every precision.
        {"lr": 2.0**-7, "weight_decay": 0.5, "decay_overshoot": True},
        {"lr": 2.0**-7, "weight_decay": 0.5, "decay_overshoot": True, "maximize": True},
    ],
)
def test_signgsd(options, dtype):
    assert_follows("signgsd", sign.SignGSD, options, dtype=dtype)


@for_each("dtype", DTYPES)
@for_each("momentum", [0.0, 0.5, 0.9, 0.99])
@for_each("common", [{}, {"weight_decay": 0.3}, {"weight_decay": 0.3, "maximize": True}])
def test_signum(momentum, common, dtype):
    assert_follows("signum", sign.Signum, {"lr": 3e-3, "momentum": momentum, **common}, dtype=dtype)


@for_each("dtype", DTYPES)
@for_each("betas", [(0.9, 0.99), (0.95, 0.98), (0.0, 0.9), (0.9, 0.0)])
@for_each("common", [{}, {"weight_decay": 0.3}, {"weight_decay": 0.3, "maximize": True}])
def test_lion(betas, common, dtype):
    assert_follows("lion", sign.Lion, {"lr": 3e-3, "betas": betas, **common}, dtype=dtype)


def test_defaults():
    weight = [torch.nn.Parameter(torch.zeros(1))]
    assert SignGSD(weight).defaults.items() >= {"lr": 1e-2, "weight_decay": 0}.items()
    assert Signum(weight).defaults.items() >= {"lr": 1e-3, "momentum": 0.9}.items()
    lion = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0, "weight_decay_method": "decoupled"}
    assert Lion(weight).defaults.items() >= lion.items()


def test_signgsd_decay_stops_at_zero():
    weight = torch.nn.Parameter(torch.tensor([0.012, -0.012, 0.0], dtype=torch.float64))
    optimizer = SignGSD([weight], lr=0.01, weight_decay=0.5)
    for expected in ([0.007, -0.007, 0], [0.002, -0.002, 0], [0, 0, 0], [0, 0, 0]):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        torch.testing.assert_close(weight.tolist(), [float(x) for x in expected], rtol=0, atol=1e-15)
    assert weight.tolist() == [0, 0, 0]


def test_signgsd_overshooting_decay_chatters():
    weight = torch.nn.Parameter(torch.tensor([0.002], dtype=torch.float64))
    optimizer = SignGSD([weight], lr=0.01, weight_decay=0.5, decay_overshoot=True)
    for expected in (-0.003, 0.002, -0.003, 0.002):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        torch.testing.assert_close(weight.item(), expected, rtol=0, atol=1e-15)


def test_signgsd_keeps_no_state():
    weight = torch.nn.Parameter(torch.ones(1000))
    optimizer = SignGSD([weight], weight_decay=0.1)
    for _ in range(3):
        weight.grad = torch.randn(1000)
        optimizer.step()
    assert optimizer.state_bytes() == 0
    assert not any(optimizer.state_dict()["state"].values())


@pytest.mark.parametrize("bad", [{"lr": -1e-3}, {"weight_decay": -0.1}])
def test_signgsd_refuses_negative_numbers(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SignGSD([torch.nn.Parameter(torch.zeros(1))], **bad)
