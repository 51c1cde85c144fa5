"""ResNet-18 for images of 32×32 pixels and for larger ones."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Stem = Literal["cifar", "imagenet"]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm, added to the input or to its projection if the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)
        self.projection = nn.Sequential()
        if stride > 1 or channels_in != channels:
            self.projection.append(nn.Conv2d(channels_in, channels, 1, stride, bias=False))
            self.projection.append(nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels_in, h, w) to (batch, channels, h / stride, w / stride)."""
        residual = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(residual + self.projection(x))


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016): a stem, four stages of two `BasicBlock`s, mean pooling, a linear layer.

    The stem for CIFAR is a 3×3 convolution without stride or pooling, so 32×32 pixels end as 4×4 positions.
    With 64 channels and 10 classes the model has 11,173,962 parameters. The published stem for ImageNet, a
    7×7 convolution of stride 2 and max pooling, divides height and width by 4. Each stage
    but the first doubles the `channels`.

    Example:
        >>> import torch
        >>> ResNet18(10, channels=4)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, classes: int, *, channels: int = 64, image_channels: int = 3, stem: Stem = "cifar"
    ) -> None:
        super().__init__()
        if stem == "cifar":
            self.stem: nn.Module = nn.Conv2d(image_channels, channels, 3, padding=1, bias=False)
            self.pool: nn.Module = nn.Identity()
        else:
            self.stem = nn.Conv2d(image_channels, channels, 7, 2, padding=3, bias=False)
            self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.stem_norm = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential()
        width = channels
        for stage in range(4):
            for stride in (1 if stage == 0 else 2, 1):
                self.blocks.append(BasicBlock(width, channels << stage, stride))
                width = channels << stage
        self.head = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape (batch, classes) for images of shape (batch, image_channels, h, w)."""
        x = self.blocks(self.pool(F.relu(self.stem_norm(self.stem(images)))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]
