"""The vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import LabError
from .transformer import Attention, Block


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) with ViT-S/16's sizes by default (Touvron et al. 2021).

    Patches become vectors by a linear map, a class token and learned positions are added, and the class
    token is classified after the last block and a norm. At 224 pixels with 1000 classes ViT-S/16 has
    22,050,664 parameters. Dropout and stochastic depth are left out.

    `size` and `patch` are the height and width of images and patches, `width` the features per position.
    ``LabError`` if `size` is not a multiple of `patch`, or `width` not one of `heads`.

    Example:
        >>> ViT(10, size=32, patch=8, width=16, depth=1, heads=2)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        classes: int,
        *,
        size: int = 224,
        patch: int = 16,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        if size % patch:
            raise LabError(f"the images' size {size} is not a multiple of patch {patch}")
        if width % heads:
            raise LabError(f"width {width} is not a multiple of heads {heads}")
        self.patches = nn.Conv2d(image_channels, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        blocks = (Block(width, Attention(width, heads), eps=1e-6) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape (batch, classes) for images of shape (batch, image_channels, size, size)."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(len(x), -1, -1), x), 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])  # type: ignore[no-any-return]
