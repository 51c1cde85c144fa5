"""torchao's weights: quantized ones are refused or left alone, mixed-precision ones are trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import steepest

quantization = pytest.importorskip("torchao.quantization")
training = pytest.importorskip("torchao.prototype.quantized_training")


def model(config: Any) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    if config is not None:
        quantization.quantize_(made, config)
    return made


@pytest.mark.parametrize("rule", ["muon", "lion", "sgd"])
def test_int8_weights_that_train_are_refused_by_name(rule: str):
    quantized = model(training.int8_weight_only_quantized_training())
    message = (
        r"parameter '0.weight' is a Int8QuantizedTrainingLinearWeight, which stores int_data \(int8\), scale"
    )
    with pytest.raises(ValueError, match=message):
        steepest.build(quantized, rule)
    with pytest.raises(ValueError, match=message):
        steepest.create("lion", quantized.named_parameters())


def test_frozen_int8_weights_are_left_alone():
    quantized = model(quantization.Int8WeightOnlyConfig())
    optimizer = steepest.build(quantized, "lion", lr=0.1)
    names = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert names == {"0.bias", "2.bias", "4.bias"}
    before = quantized[4].bias.detach().clone()
    quantized(torch.randn(4, 32)).square().sum().backward()
    optimizer.step()
    assert ((quantized[4].bias - before).abs() - 0.1).abs().max() < 1e-6
    quantized[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match="Int8Tensor"):
        steepest.create("lion", quantized.named_parameters())


@pytest.mark.parametrize("rule", ["muon", "lion", "sgd"])
def test_weights_for_int8_products_train_as_plain_ones(rule: str):
    mixed, plain = model(training.int8_mixed_precision_training()), model(None)
    optimizers = [steepest.build(each, rule, lr=0.01) for each in (mixed, plain)]
    for _ in range(3):
        for ours, theirs in zip(mixed.parameters(), plain.parameters(), strict=True):
            theirs.grad = torch.randn(theirs.shape)
            ours.grad = theirs.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs in zip(mixed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(getattr(ours, "_data", ours), theirs)
