"""SASRec: a causal transformer over a user's items (Kang & McAuley 2018, arXiv:1808.09781)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import LabError

PADDING = 0


@dataclass(frozen=True)
class SASRecConfig:
    """The sizes of a `SASRec`; the defaults are the paper's for sparse data, with width 64.

    Of a history only the last `maxlen` items are read. A size that is not positive, or a `width` that is no
    multiple of `heads`, raises ``LabError``.
    """

    maxlen: int = 50
    width: int = 64
    blocks: int = 2
    heads: int = 1
    dropout: float = 0.5

    def __post_init__(self) -> None:
        for name in ("maxlen", "width", "blocks", "heads"):
            if getattr(self, name) < 1:
                raise LabError(f"{name} must be positive, got {getattr(self, name)}")
        if self.width % self.heads:
            raise LabError(f"width {self.width} is not a multiple of heads {self.heads}")


class Attention(nn.Module):
    """Self-attention of each position to itself and to earlier ones."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query, self.key, self.value = (
            nn.Linear(config.width, config.width, bias=False) for _ in range(3)
        )

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Map (batch, positions, width) to the same shape; `visible[b, 0, i, j]`: position i attends to j."""
        query, key, value = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return mixed.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Attention and a two-layer perceptron, each as x + dropout(f(norm(x)))."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.width), nn.ReLU(), nn.Linear(config.width, config.width)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Map (batch, positions, width) to the same shape."""
        x = x + self.dropout(self.attention(self.attention_norm(x), visible))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]


class SASRec(nn.Module):
    """Predicts each item of a history from the items before it.

    Items are 1, …, `items`, and 0 pads a history on the left; nothing depends on its embedding. The scores
    are the dot products of the last features with the embeddings of the items, which the input uses too.

    Example:
        >>> model = SASRec(items=10, config=SASRecConfig(maxlen=4, width=8)).eval()
        >>> model.score(torch.tensor([[0, 0, 3, 7]])).shape
        torch.Size([1, 11])
    """

    def __init__(self, items: int, config: SASRecConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SASRecConfig()
        self.embedding = nn.Embedding(items + 1, config.width)
        self.positions = nn.Parameter(torch.empty(config.maxlen, config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, histories: Tensor) -> Tensor:
        """Return the features after each position, of shape (batch, positions, width).

        `histories` are items padded on the left, integers of shape (batch, positions ≤ `maxlen`). The last
        position is always the most recent item, so more padding changes nothing.
        """
        length = histories.shape[1]
        x = self.embedding(histories) * self.config.width**0.5 + self.positions[-length:]
        x = self.dropout(x)
        diagonal = torch.eye(length, dtype=torch.bool, device=x.device)
        # A padded position sees itself, because a softmax over nothing is NaN.
        visible = (histories != PADDING).view(-1, 1, 1, length).logical_or(diagonal).tril()
        for block in self.blocks:
            x = block(x, visible)
        return self.norm(x)  # type: ignore[no-any-return]

    def score(self, histories: Tensor) -> Tensor:
        """Return the score of each item as the next one, shape (batch, items + 1)."""
        return self(histories)[:, -1] @ self.embedding.weight.T  # type: ignore[no-any-return]

    def loss(self, histories: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
        """Return the mean over targets of −log σ(target's score) − log(1 − σ(negative's score)).

        `targets` are the items after each position, 0 where there is none; `negatives` are other items.
        """
        features = self(histories)
        positive = (features * self.embedding(targets)).sum(-1)
        negative = (features * self.embedding(negatives)).sum(-1)
        terms = F.softplus(-positive) + F.softplus(negative)
        mask = targets != PADDING
        return (terms * mask).sum() / mask.sum()
