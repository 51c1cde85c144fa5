"""Ternary layers in Hugging Face's models, and beside timm's averages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import steepest
from steepest.ternary import BinaryLinear, TernaryFlip, TernaryLinear, densify, ternarize


def test_gpt2s_conv1d_become_ternary():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_head=4, n_layer=1, n_positions=8, vocab_size=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    done = ternarize(model)
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert list(done.replaced) == [f"transformer.h.0.{name}" for name in names]
    assert done.replaced["transformer.h.0.attn.c_attn"] == (48, 16)
    assert not done.others
    tokens = torch.arange(6).view(1, 6)
    logits = model(tokens).logits
    densify(model)  # nn.Linear, stored [out, in]: the same products
    torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-4, atol=1e-5)
    ternarize(model)
    optimizer = steepest.build(model.train(), "lion", ternary={"threshold": 1})
    before = model.transformer.h[0].attn.c_attn.unpack()
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model.transformer.h[0].attn.c_attn.unpack() != before).any()


def test_falcons_linear_layers_become_ternary():
    """Its own subclass computes what ``nn.Linear`` does, with the bias added apart."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 32}
    model = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, bias=True)).eval()
    done = ternarize(model)
    names = [
        "self_attention.query_key_value",
        "self_attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ]
    assert set(done.replaced) == {f"transformer.h.0.{name}" for name in names}
    tokens = torch.arange(6).view(1, 6)
    logits = model(tokens).logits
    densify(model)
    torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-4, atol=1e-5)


def test_experts_are_listed():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        intermediate_size=24,
        num_local_experts=3,
    )
    done = ternarize(transformers.MixtralForCausalLM(config))
    assert {shape for shape, _ in done.others.values()} == {(3, 48, 16), (3, 16, 24)}
    assert "3,456 of hidden layers that are not linear stay float" in str(done)


@pytest.mark.parametrize("layer", [TernaryLinear, BinaryLinear])
@pytest.mark.parametrize("kind", ["ModelEmaV2", "ModelEmaV3"])
def test_timms_averages(kind: str, layer: type[TernaryLinear]):
    utils = pytest.importorskip("timm.utils")
    model = nn.Sequential(layer(64, 64), nn.ReLU(), layer(64, 64))
    flip = TernaryFlip(model, threshold=1)
    emas = [getattr(utils, kind)(model, decay=0.9)]
    if kind == "ModelEmaV3":
        emas.append(utils.ModelEmaV3(model, decay=0.9, exclude_buffers=True))

    def train():
        for _ in range(5):
            model(torch.randn(8, 64)).square().sum().backward()
            flip.step()
            flip.zero_grad()
            for ema in emas:
                ema.update(model)

    x = torch.randn(4, 64)
    if kind == "ModelEmaV2":
        # It takes its own state dict for each update.
        for use in (train, lambda: emas[0].module(x)):
            with pytest.raises(RuntimeError, match=r"packed (holds|does not).*use_buffers=False"):
                use()
        return
    train()
    # It copies integer buffers either way.
    for ema in emas:
        ema.module(x)
        assert torch.equal(ema.module[0].packed, model[0].packed)
