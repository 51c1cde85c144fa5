"""A small model with ternary layers and a way to train it."""

from __future__ import annotations

import torch
from torch import nn

from steepest.ternary import BinaryLinear, TernaryLinear


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        TernaryLinear(6, 13), nn.LayerNorm(13), nn.GELU(), TernaryLinear(13, 7, scale="group", group_size=5),
        nn.Linear(7, 2),
    )  # fmt: skip


def mixed_model(seed=0):
    """The same with a binary layer in place of the second ternary one."""
    model = small_model(seed)
    model[3] = BinaryLinear(13, 7, scale="group", group_size=5)
    return model


def batch(index, rows=8):
    generator = torch.Generator().manual_seed(1000 + index)
    x = torch.randn(rows, 6, generator=generator)
    return x, torch.stack([x[:, 0] * x[:, 1], x.sum(1)], dim=1)


def loss_of(model, index, rows=8):
    x, y = batch(index, rows)
    return (model(x) - y).square().mean()


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def accumulators(optimizer):
    """Every layer's accumulator, by its name; zeros before the first step."""
    found = {}
    for name, layer in optimizer.targets.layers.items():
        blank = torch.zeros(layer.out_features, layer.in_features, dtype=torch.int8)
        found[name] = optimizer.state.get(layer.votes, {}).get("accumulator", blank)
    return found


def after(optimizer, step):
    """The same optimizer, as if it had taken so many steps."""
    for layer in optimizer.targets.layers.values():
        optimizer.state[layer.votes]["step"] = torch.tensor(float(step))
    optimizer.targets.bind(optimizer.param_groups, optimizer.state)
    return optimizer


def taken(optimizer):
    """The number of steps that were taken with votes."""
    states = [optimizer.state.get(layer.votes, {}) for layer in optimizer.targets.layers.values()]
    (steps,) = {int(state.get("step", 0)) for state in states}
    return steps


def has_votes(optimizer):
    return any(vote_buffer.passes > 0 for vote_buffer in optimizer.targets.buffers.values())


def pending(trainer):
    """Every layer's votes since the last step."""
    return [vote_buffer.pending for vote_buffer in trainer.targets.buffers.values()]


def train(model, optimizer, trainer, steps, first=0):
    """Take steps of both, on batches from the number ``first`` on."""
    for index in range(first, first + steps):
        loss_of(model, index).backward()
        for each in (optimizer, trainer):
            each.step()
            each.zero_grad()
