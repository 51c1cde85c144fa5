"""ResNet-18 and the vision transformer against published sizes and a plain computation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from steepest.lab.models.resnet import ResNet18
from steepest.lab.models.transformer import Attention, Block
from steepest.lab.models.vit import ViT


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (lambda: ResNet18(10), 11_173_962),
        (lambda: ResNet18(1000, stem="imagenet"), 11_689_512),
        (lambda: ViT(1000), 22_050_664),
    ],
)
def test_published_sizes(make, parameters):
    with torch.device("meta"):
        model = make()
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(("stem", "size", "positions"), [("cifar", 32, 4), ("imagenet", 224, 7)])
def test_a_resnet_ends_with_as_many_positions_as_published(stem, size, positions):
    model = ResNet18(10, channels=2, stem=stem).eval()
    seen = []
    model.blocks.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    logits = model(torch.randn(1, 3, size, size))
    assert seen[0].shape == (1, 16, positions, positions)
    torch.testing.assert_close(logits, model.head(seen[0].flatten(2).mean(2)))


def test_a_block_of_the_transformer_equals_torchs_encoder_layer():
    torch.manual_seed(0)
    block = Block(24, Attention(24, heads=3), eps=1e-6).double()
    peer = nn.TransformerEncoderLayer(
        24, 3, 96, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
    ).double()
    attention = peer.self_attn
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
        attention.in_proj_weight.copy_(block.attention.inputs.weight)
        attention.in_proj_bias.copy_(block.attention.inputs.bias)
        pairs = [
            (attention.out_proj, block.attention.output),
            (peer.linear1, block.up),
            (peer.linear2, block.down),
        ]
        for theirs, ours in [*pairs, (peer.norm1, block.attention_norm), (peer.norm2, block.mlp_norm)]:
            theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 24, dtype=torch.double)
    torch.testing.assert_close(block(x), peer(x))


def test_without_positions_the_transformer_ignores_the_order_of_patches():
    torch.manual_seed(0)
    model = ViT(4, size=8, patch=4, width=16, depth=2, heads=2).double()
    left, right = torch.randn(2, 1, 3, 8, 4, dtype=torch.double)
    images = torch.cat((left, right), 3), torch.cat((right, left), 3)
    assert not torch.allclose(model(images[0]), model(images[1]), rtol=1e-3)
    nn.init.zeros_(model.positions)
    torch.testing.assert_close(model(images[0]), model(images[1]))


def test_sizes_that_do_not_fit_are_rejected():
    with pytest.raises(ValueError, match="size 30 is not a multiple of patch 4"):
        ViT(10, size=30, patch=4)
    with pytest.raises(ValueError, match="width 10 is not a multiple of heads 4"):
        ViT(10, width=10, heads=4)
