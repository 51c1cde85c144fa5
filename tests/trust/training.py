"""A small model in training, for what verification must find in it or must not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import steepest

__all__ = ["backward", "make_model", "rejected", "train"]


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Two linear layers, whose parameters are named 0.weight, 0.bias, 2.weight and 2.bias."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def backward(model: nn.Module, step: int, factor: float | torch.Tensor = 1.0) -> None:
    """Add the gradients of a batch's loss, times a factor."""
    dtype = next(model.parameters()).dtype
    batch = torch.randn(16, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
    (factor * model(batch).square().mean()).backward()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 3,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Take ordinary steps; ``between`` is called between backward and step."""
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step)
        between()
        optimizer.step()


@contextmanager
def rejected(said: str, optimizer: torch.optim.Optimizer, **options: Any) -> Iterator[steepest.Verification]:
    """A verification that must fail, in a step or at its end, with a message that contains a pattern."""
    with pytest.raises(steepest.VerificationError, match=said):  # noqa: SIM117 (the other way it reads worse)
        with steepest.verify(optimizer, **options) as verification:
            yield verification
