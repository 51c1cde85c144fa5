"""Small classifiers of 8×8 digits, also with only linear hidden layers, which ternary layers can replace."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


def digit_mlp() -> nn.Module:
    """Build a 64-64-10 perceptron for images of shape (batch, 1, 8, 8)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def normed_mlp(width: int = 256) -> nn.Module:
    """Build a 64-256-256-10 perceptron with layer norms for images of shape (batch, 1, 8, 8)."""
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


class DigitConvNet(nn.Module):
    """Two 3×3 convolutions, each followed by 2×2 max pooling, and a linear output layer.

    With `patches`, the convolutions are linear layers over patches, and batch norms follow them.

    Example:
        >>> import torch
        >>> DigitConvNet()(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, channels: int = 16, *, patches: bool = False) -> None:
        super().__init__()
        conv = PatchConv if patches else partial(nn.Conv2d, kernel_size=3, padding=1)
        norm = nn.BatchNorm2d if patches else nn.Identity
        self.first, self.second = conv(1, channels), conv(channels, 2 * channels)
        self.norms = nn.ModuleList([norm(channels), norm(2 * channels)])
        self.head = nn.Linear(2 * channels * 4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape (batch, 10) for images of shape (batch, 1, 8, 8)."""
        x = F.max_pool2d(F.relu(self.norms[0](self.first(images))), 2)
        x = F.max_pool2d(F.relu(self.norms[1](self.second(x))), 2)
        return self.head(x.flatten(1))  # type: ignore[no-any-return]
