"""AdamW's learning rates carry over: on random gradients an update has AdamW's rms of 0.2, in every shape."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import steepest
from steepest.rule import find_rule

LAYERS = {
    "square": lambda: nn.Linear(96, 96, bias=False),
    "4:1": lambda: nn.Linear(48, 192, bias=False),
    "1:4": lambda: nn.Linear(192, 48, bias=False),
    "tall": lambda: nn.Linear(16, 512, bias=False),
    "wide": lambda: nn.Linear(512, 16, bias=False),
    "conv": lambda: nn.Conv2d(24, 48, 3, bias=False),
}
RATE = 0.01


def updates(rule: str, layer: nn.Module, steps: int, **options: object) -> list[float]:
    """The rms of every update's size over lr."""
    model = nn.Sequential(layer, nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = steepest.build(model, rule, lr=RATE, weight_decay=0.0, **options)
    assert optimizer.explain().rows[0].rule == rule
    generator = torch.Generator().manual_seed(0)
    sizes = []
    for _ in range(steps):
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.randn(layer.weight.shape, generator=generator)
        optimizer.step()
        sizes.append(float((layer.weight.detach() - before).square().mean().sqrt()) / RATE)
    return sizes


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rule", ["muon", "normuon"])
def test_muon(kind: str, rule: str):
    for size in updates(rule, LAYERS[kind](), 6):
        assert 0.18 <= size <= 0.22


@pytest.mark.parametrize("rule", steepest.list_optimizers())
def test_a_rule_that_says_it_moves_like_adamw_does_and_no_other(rule: str):
    """With AdamW's scale, where a rule has one; measured on a square matrix with momentum."""
    found = find_rule(rule)
    options = {"scale": "match_rms_adamw"} if "ns_steps" in found.hyper else {}
    claims = found.moves_like_adamw({**found.defaults(), **options})
    group = {**found.defaults(), **options, "lr": RATE, "weight_decay": 0.0}
    weight = nn.Parameter(torch.randn(96, 96, generator=torch.Generator().manual_seed(1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the base class without a function of its own
        optimizer = steepest.create(rule, [weight], **{k: group[k] for k in ("lr", "weight_decay", *options)})
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        before = weight.detach().clone()
        weight.grad = 1000 * torch.randn(96, 96, generator=generator)
        optimizer.step()
    size = float((weight.detach() - before).square().mean().sqrt()) / RATE
    assert (0.15 <= size <= 0.25) is claims


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rule", ["quad", "procrustes"])
def test_psgd_with_a_slow_fit(kind: str, rule: str):
    rates = {"preconditioner_lr": 0.1, "preconditioner_min_lr": 0.1}
    for size in updates(rule, LAYERS[kind](), 30, momentum=0.0, **rates):
        assert 0.18 <= size <= 0.22


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rule", ["quad", "procrustes"])
def test_psgd_with_its_defaults_takes_smaller_steps_and_never_larger_ones(kind: str, rule: str):
    """A fast fit shrinks the very gradient it has just seen, a square matrix's the most: by a sixth."""
    sizes = updates(rule, LAYERS[kind](), 100)
    assert 0.16 <= sum(sizes[-20:]) / 20 <= 0.2
    assert max(sizes) <= 0.22 * 1.0001
