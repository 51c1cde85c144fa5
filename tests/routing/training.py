"""A small transformer, and steps with gradients that are the same in every model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["Block", "Transformer", "same_bits", "set_gradients", "take_steps"]


class Block(nn.Module):
    """Attention whose projection is fused, and an MLP that is a list of its own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Transformer(nn.Module):
    """Embeddings, blocks, a norm and a head."""

    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positions = nn.Parameter(torch.randn(4, width))
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11)


def set_gradients(model: nn.Module, step: int) -> None:
    """Set gradients that depend on the weights, the tensor and the step's number alone."""
    for index, param in enumerate(model.parameters()):
        noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(1000 * step + index))
        param.grad = (noise + 0.5 * param.detach()).to(param.dtype)


def take_steps(optimizer: torch.optim.Optimizer, model: nn.Module, which: Iterable[int] = range(3)) -> None:
    """Take the steps of these numbers."""
    for step in which:
        set_gradients(model, step)
        optimizer.step()


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two models have the same weights."""
    pairs: list[tuple[Tensor, Tensor]] = list(zip(one.parameters(), other.parameters(), strict=True))
    return all(torch.equal(*pair) for pair in pairs)
