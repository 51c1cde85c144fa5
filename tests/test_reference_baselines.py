"""SGD, AdamW and AdEMAMix follow their equations, step by step."""

import math

import pytest
import torch

from loops import for_each
from reference import baselines
from reference.compare import SHAPE, STEPS, assert_follows, halving
from reference.gradients import hard_gradients
from steepest import AdamW, AdEMAMix
from steepest.rules import AdEMAMixRule

DTYPES = [torch.float64, torch.float32]


@for_each("dtype", DTYPES)
@for_each(
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("warmup", [None, 1, 25, STEPS, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"betas": (0.8, 0.95, 0.99), "alpha": 8.0, "eps": 1e-3},
        {"betas": (0.5, 0.9, 0.4), "weight_decay": 0.0, "maximize": True},
        {"alpha": 0.0, "weight_decay": 0.3},
    ],
)
def test_ademamix(options, warmup, dtype):
    options = {"lr": 1e-2, "t_alpha_beta3": warmup, **options}
    assert_follows("ademamix", baselines.AdEMAMix, options, dtype=dtype)


@for_each(("beta1", "beta3"), [(0.9, 0.9999), (0.0, 0.99), (0.9, 0.0), (0.0, 0.0), (0.99, 0.9)])
@for_each("warmup", [None, 1, 7])
def test_ademamixs_schedules_are_the_same_where_only_the_device_knows_the_step(beta1, beta3, warmup):
    def scalars(step):
        return AdEMAMixRule().scalars(step, betas=(beta1, 0.999, beta3), alpha=5.0, t_alpha_beta3=warmup)

    steps = torch.arange(1.0, 11.0, dtype=torch.float64)
    on_host, on_device = [scalars(float(step)) for step in steps], scalars(steps)
    assert on_host[0].keys() == on_device.keys()
    for name, values in on_device.items():
        expected = torch.tensor([numbers[name] for numbers in on_host], dtype=torch.float64)
        values = torch.as_tensor(values, dtype=torch.float64).expand(10)
        torch.testing.assert_close(values, expected, rtol=1e-14, atol=0)
    assert on_host[-1]["slow_beta"] == pytest.approx(beta3, rel=1e-14)
    assert on_host[-1]["slow_weight"] == 5.0
    if warmup == 7 and 0 < beta1 < beta3:
        # Three sevenths of the way the half-life is three sevenths of the way.
        start, end, now = (math.log(0.5) / math.log(b) for b in (beta1, beta3, on_host[2]["slow_beta"]))
        assert now == pytest.approx(start + 3 / 7 * (end - start))


def test_ademamix_without_its_slow_average_is_adamw():
    common = {"lr": 1e-2, "weight_decay": 0.1, "compile": False}
    param, twin = (torch.nn.Parameter(torch.ones(SHAPE)) for _ in range(2))
    ours = AdEMAMix([param], betas=(0.9, 0.99, 0.5), alpha=0.0, **common)
    adamw = AdamW([twin], betas=(0.9, 0.99), **common)
    for gradient in hard_gradients(SHAPE, STEPS):
        param.grad, twin.grad = gradient.float(), gradient.float()
        ours.step()
        adamw.step()
        assert torch.equal(param, twin)


@pytest.mark.parametrize("name", ["sgd", "adamw", "ademamix"])
def test_under_a_schedule(name):
    references = {"sgd": baselines.SGD, "adamw": baselines.AdamW, "ademamix": baselines.AdEMAMix}
    reference = references[name]
    options = {"lr": 1e-2, "weight_decay": 0.1}
    assert_follows(name, reference, options, schedule=halving(1e-2))
