"""Models with only linear hidden layers, which can all be replaced by ternary layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .digits import CLASSES


def normed_mlp(width: int = 256) -> nn.Module:
    """Build a 64-256-256-10 perceptron with layer norms for digits of shape (batch, 1, 8, 8).

    Example:
        >>> import torch
        >>> normed_mlp()(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    hidden = [
        module
        for size in (64, width)
        for module in (nn.Linear(size, width, bias=False), nn.LayerNorm(width), nn.ReLU())
    ]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, CLASSES))


class PatchConv(nn.Module):
    """A 3×3 convolution computed by a linear layer over patches."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(9 * channels_in, channels_out, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, in, height, width) to (batch, out, height, width)."""
        patches = F.unfold(images, 3, padding=1).transpose(1, 2)
        mapped: Tensor = self.linear(patches)
        return mapped.transpose(1, 2).reshape(len(images), -1, *images.shape[2:])


class PatchConvNet(nn.Module):
    """Two patch convolutions, each with batch norm and 2×2 max pooling, and a linear output layer.

    Example:
        >>> import torch
        >>> PatchConvNet()(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.first, self.second = PatchConv(1, channels), PatchConv(channels, 2 * channels)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels), nn.BatchNorm2d(2 * channels)])
        self.head = nn.Linear(2 * channels * 4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape (batch, 10) for images of shape (batch, 1, 8, 8)."""
        x = F.max_pool2d(F.relu(self.norms[0](self.first(images))), 2)
        x = F.max_pool2d(F.relu(self.norms[1](self.second(x))), 2)
        return self.head(x.flatten(1))  # type: ignore[no-any-return]
