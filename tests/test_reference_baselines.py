"""SGD and AdamW follow their equations, step by step."""

import pytest
import torch

from reference import baselines
from reference.compare import SHAPE, STEPS, assert_follows, halving
from reference.gradients import hard_gradients

DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "dampening": 1.0},
        {"momentum": 0.9, "nesterov": True},
        {"weight_decay": 0.2},
        {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.2, "maximize": True},
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.2, "maximize": True},
    ],
)
def test_sgd(options, dtype):
    assert_follows("sgd", baselines.SGD, {"lr": 1e-2, **options}, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"betas": (0.8, 0.95), "eps": 1e-3},
        {"betas": (0.0, 0.99), "weight_decay": 0.3},
        {"betas": (0.9, 0.5), "weight_decay": 0.0, "maximize": True},
        {"eps": 0.0},
    ],
)
def test_adamw(options, amsgrad, dtype):
    gradients = hard_gradients(SHAPE, STEPS)
    if options.get("eps") == 0.0:
        # An element without any gradient would be 0/0.
        gradients = [torch.where(g == 0, 1e-3, g) for g in gradients]
    assert_follows(
        "adamw",
        baselines.AdamW,
        {"lr": 1e-2, "amsgrad": amsgrad, **options},
        dtype=dtype,
        gradients=gradients,
    )


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_under_a_schedule(name):
    reference = {"sgd": baselines.SGD, "adamw": baselines.AdamW}[name]
    options = {"lr": 1e-2, "weight_decay": 0.1}
    assert_follows(name, reference, options, schedule=halving(1e-2))
