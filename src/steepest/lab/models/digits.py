"""Two small classifiers of 8×8 digits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


def digit_mlp(width: int = 64) -> nn.Module:
    """Build a perceptron with one hidden layer of `width` units for images of shape (batch, 1, 8, 8).

    Example:
        >>> import torch
        >>> digit_mlp()(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, CLASSES))


class DigitConvNet(nn.Module):
    """Two 3×3 convolutions, each followed by 2×2 max pooling, and a linear output layer.

    Example:
        >>> import torch
        >>> DigitConvNet()(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.head = nn.Linear(2 * channels * 4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape (batch, 10) for images of shape (batch, 1, 8, 8)."""
        x = F.max_pool2d(F.relu(self.first(images)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return self.head(x.flatten(1))  # type: ignore[no-any-return]
