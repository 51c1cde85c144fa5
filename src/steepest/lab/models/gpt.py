"""A byte-level GPT with pre-norm blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import LabError
from .transformer import Attention, Block

VOCABULARY = 256

Positions = Literal["rotary", "learned"]


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a `GPT`; ``LabError`` if one is not positive, or `width` not divisible by `heads`."""

    width: int = 96
    depth: int = 2
    heads: int = 4
    """With rotary positions each must have an even width."""
    context: int = 64
    """Maximum number of positions."""
    positions: Positions = "rotary"
    """"rotary" rotates queries and keys by their position; "learned" adds a learned vector to each."""
    tied: bool = False
    """Whether the output layer shares the embedding's weights."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "context"):
            if getattr(self, name) < 1:
                raise LabError(f"{name} must be positive, got {getattr(self, name)}")
        if self.width % self.heads:
            raise LabError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.positions not in ("rotary", "learned"):
            raise LabError(f"positions must be 'rotary' or 'learned', got {self.positions!r}")
        if self.positions == "rotary" and (self.width // self.heads) % 2:
            raise LabError(f"rotary positions need an even width per head, got {self.width // self.heads}")


class Rotary(nn.Module):
    """Rotates each pair of features by an angle proportional to the position (Su et al. 2021).

    The dot product of a rotated query and key depends only on the distance between their positions.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_width: int, context: int, base: float = 10_000.0) -> None:
        super().__init__()
        frequency = base ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
        angle = torch.outer(torch.arange(context, dtype=torch.float32), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate `x` of shape (..., positions, head_width)."""
        length = x.shape[-2]
        cos, sin = self.cos[:length], self.sin[:length]
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class GPT(nn.Module):
    """Predicts each byte from the bytes before it.

    Example:
        >>> model = GPT(GPTConfig(width=16, depth=1, heads=2, context=8))
        >>> model(torch.zeros(3, 8, dtype=torch.long)).shape
        torch.Size([3, 8, 256])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.positions = (
            nn.Parameter(torch.empty(config.context, config.width)) if config.positions == "learned" else None
        )
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        # Layers that write to the residual stream start smaller, so its variance does not grow with depth.
        for block in self.blocks:
            assert isinstance(block, Block)
            for layer in (block.attention.output, block.down):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * config.depth))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map bytes (batch, positions ≤ `context`) to logits of the next ones, (batch, positions, 256)."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def _block(config: GPTConfig) -> Block:
    rotary = Rotary(config.width // config.heads, config.context) if config.positions == "rotary" else None
    attention = Attention(config.width, config.heads, bias=False, causal=True, rotary=rotary)
    return Block(config.width, attention, bias=False)
