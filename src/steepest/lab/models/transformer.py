"""The pre-norm transformer block that the GPT and the vision transformer share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention; `rotary`, if given, is applied to queries and keys."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        bias: bool = True,
        causal: bool = False,
        rotary: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.inputs = nn.Linear(width, 3 * width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)
        self.rotary = rotary or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Attend from each position of `x`, shape (batch, positions, width), to all, or to earlier ones."""
        query, key, value = self.inputs(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.rotary(query), self.rotary(key)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """`Attention` and a two-layer perceptron, each with a norm before it and a residual connection."""

    def __init__(self, width: int, attention: Attention, *, bias: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(width, eps)
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.down = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, positions, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))  # type: ignore[no-any-return]
