"""Peak memory of a pass through a layer: a block of dense weights or two, never all of them."""

from __future__ import annotations

import pytest
import torch

from peak_memory import highest
from steepest.ternary import BinaryLinear, TernaryFlip, TernaryLinear

WIDTH, ROWS = 2048, 4
BLOCK = 4 << 19  # bytes: 2**19 float32


@pytest.mark.parametrize("kind", [TernaryLinear, BinaryLinear])
@pytest.mark.parametrize(
    ("what", "blocks"),
    [
        # Weights and temporaries of unpacking; as many again for gradients; a byte each for votes.
        ("frozen weights", 1.5),
        ("scales alone", 3.3),
        ("votes by sign", 3.3 + WIDTH**2 / BLOCK),
    ],
)
def test_forward_and_backward_hold_blocks(what: str, blocks: float, kind: type[TernaryLinear]):
    layer = kind(WIDTH, WIDTH, bias=False)
    layer.scale.requires_grad_(what != "frozen weights")
    flip = TernaryFlip(layer, process_group=False, compile=False) if what == "votes by sign" else None
    layer.votes.requires_grad_(flip is not None)
    x, dy = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(ROWS, WIDTH)
    layer(x).backward(dy)
    if flip is not None:
        flip.zero_grad()
    x.grad = layer.scale.grad = None
    y = None

    def forward():
        nonlocal y
        y = layer(x)

    assert BLOCK < highest(forward) < 1.5 * BLOCK
    assert (blocks - 0.6) * BLOCK < highest(lambda: y.backward(dy)) < blocks * BLOCK
