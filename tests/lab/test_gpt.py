from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from steepest.lab.models.gpt import GPT, GPTConfig, Positions, Rotary

SMALL = {"width": 16, "depth": 2, "heads": 2, "context": 12}


def small(positions: Positions = "rotary", *, tied: bool = False) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**SMALL, positions=positions, tied=tied))  # type: ignore[arg-type]


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_logits_do_not_depend_on_later_tokens(positions: Positions) -> None:
    model = small(positions)
    tokens = torch.randint(0, 256, (3, 12))
    with torch.no_grad():
        logits = model(tokens)
        for cut in range(1, 12):
            changed = tokens.clone()
            changed[:, cut:] = (changed[:, cut:] + 101) % 256
            torch.testing.assert_close(model(changed)[:, :cut], logits[:, :cut], rtol=1e-5, atol=1e-6)
            assert not torch.allclose(model(changed)[:, cut:], logits[:, cut:])


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_logits_depend_on_the_order_of_earlier_tokens(positions: Positions) -> None:
    model = small(positions)
    # At initialization attention is almost uniform in such a small model, so use larger weights.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    tokens = torch.tensor([[1, 2, 3, 4]])
    swapped = torch.tensor([[2, 1, 3, 4]])
    with torch.no_grad():
        assert not torch.allclose(model(tokens)[:, -1], model(swapped)[:, -1], atol=1e-3)


def test_rotary_products_depend_only_on_the_distance() -> None:
    rotary = Rotary(head_width=8, context=64).double()
    query, key = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotated_query, rotated_key = rotary(query.expand(64, 8)), rotary(key.expand(64, 8))
    products = rotated_query @ rotated_key.T
    for distance in (-20, -1, 0, 5, 40):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert products[0].std() > 0.1


def test_rotary_preserves_norms() -> None:
    x = torch.randn(2, 3, 64, 8)
    torch.testing.assert_close(Rotary(8, 64)(x).norm(dim=-1), x.norm(dim=-1))


def test_attention_is_a_causal_softmax() -> None:
    block = small().blocks[0]
    attention = block.attention  # type: ignore[union-attr]
    x = torch.randn(1, 5, 16)
    q, k, v = attention.inputs(x).view(1, 5, 3, 2, 8).unbind(2)  # type: ignore[operator, union-attr]
    q, k = attention.rotary(q.transpose(1, 2)), attention.rotary(k.transpose(1, 2))  # type: ignore[operator, union-attr]
    scores = q @ k.transpose(-1, -2) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    mixed = (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).reshape(1, 5, 16)
    torch.testing.assert_close(attention(x), F.linear(mixed, attention.output.weight))  # type: ignore[operator, union-attr, arg-type]


def test_an_untrained_model_predicts_almost_uniformly() -> None:
    tokens = torch.randint(0, 256, (8, 12))
    loss = F.cross_entropy(small()(tokens).flatten(0, 1), tokens.flatten())
    assert abs(loss.item() - math.log(256)) < 0.1


def test_tied_output_weights_share_the_embedding() -> None:
    tied, free = small(tied=True), small()
    assert tied.head.weight is tied.embedding.weight
    saved = sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters())
    assert saved == 256 * 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": 0}, "depth must be positive"),
        ({"width": 15}, "not a multiple of heads"),
        ({"width": 6, "heads": 2}, "even width per head"),
        ({"positions": "none"}, "'rotary' or 'learned'"),
    ],
)
def test_invalid_configurations_are_rejected(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GPTConfig(**{**SMALL, **change})  # type: ignore[arg-type]
