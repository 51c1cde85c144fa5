"""The views that build() knows for timm's weights, against its modules' own forward passes."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from steepest.views import View

from .known_layouts import Alone, Case, check, without_case

timm = pytest.importorskip("timm")

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(1, 4, 16, generator=DRAW, dtype=torch.float64)
GRID = X.view(1, 2, 2, 16)
CHANNELS_FIRST = X.mT.reshape(1, 16, 2, 2)
IMAGE = torch.randn(1, 3, 16, 16, generator=DRAW, dtype=torch.float64)
WITH_CLASS = torch.randn(1, 5, 16, generator=DRAW, dtype=torch.float64)

EQUAL, BY_HEAD, PAIR = ("rows", (16, 16, 16)), ("rows", (4, 4, 4), 4), ("rows", (16, 16))
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 4, "num_classes": 3}


def module(
    where: str,
    kind: str,
    weight: str,
    *sizes: Any,
    inputs: tuple[Any, ...] = (X,),
    view: View = EQUAL,
    effects: str = "ssl",
    seen: str = "",
    **options: Any,
) -> tuple[str, Case]:
    """The name and the case of one module, made of these sizes and options."""

    def make() -> nn.Module:
        return Alone(getattr(importlib.import_module(f"timm.{where}"), kind)(*sizes, **options))

    variant = "".join(f", {name}={value}" for name, value in options.items() if isinstance(value, bool))
    return f"{kind}.{weight}, {where}{variant}", Case(make, inputs, view, effects, seen)


def model(name: str, of: str, view: View, effects: str, **options: Any) -> tuple[str, Case]:
    """The name and the case of a whole model."""
    return f"{of}, {name}", Case(lambda: timm.create_model(name, **VIT, **options), (IMAGE,), view, effects)


CASES = dict(
    [
        model("vit_tiny_patch16_224", "Attention.qkv", EQUAL, "ssl"),
        module("layers.attention", "Attention", "qkv", 16, 4),
        module("models.beit", "Attention", "qkv", 16, 4),
        module("models.efficientformer", "Attention", "qkv", 16, 4, 4, 2, 2, view=("rows", (4, 4, 8), 4)),
        module("models.fastvit", "Attention", "qkv", 16, 4, inputs=(CHANNELS_FIRST,)),
        module("models.metaformer", "Attention", "qkv", 16, 4),
        module("models.nest", "Attention", "qkv", 16, 4, inputs=(GRID,)),
        module("models.tiny_vit", "Attention", "qkv", 16, 4, 4, 2, (2, 2), view=("rows", (4, 4, 8), 4)),
        module("models.vision_transformer_sam", "Attention", "qkv", 16, 4, inputs=(GRID,)),
        module("models.volo", "Attention", "qkv", 16, 4, inputs=(GRID,)),
        module("layers.attention", "AttentionRope", "qkv", 16, 4),
        module("models.maxxvit", "AttentionCl", "qkv", 16, 16, 4, head_first=True, view=BY_HEAD),
        module("models.maxxvit", "AttentionCl", "qkv", 16, 16, 4, head_first=False),
        module("layers.diff_attention", "DiffAttention", "qkv", 16, 4, seen="sub_norm"),
        module("models.eva", "EvaAttention", "qkv", 16, 4, qkv_bias=False, scale_norm=False),
        module("models.davit", "WindowAttention", "qkv", 16, (2, 2), 4),
        module("models.swin_transformer", "WindowAttention", "qkv", 16, 4, window_size=(2, 2)),
        module("models.swin_transformer_v2", "WindowAttention", "qkv", 16, (2, 2), 4),
        module(
            "models.gcvit",
            "WindowAttentionGlobal",
            "qkv",
            *(16, 4, (2, 2)),
            inputs=(X, X.flip(1)),
            view=PAIR,
            effects="sl",
            use_global=True,
        ),
        module("models.gcvit", "WindowAttentionGlobal", "qkv", 16, 4, (2, 2), use_global=False),
        module("models.swin_transformer_v2_cr", "WindowMultiHeadAttention", "qkv", 16, 4, (2, 2)),
        module("models.hiera", "MaskUnitAttention", "qkv", 16, 16, 4),
        module("models.hieradet_sam2", "MultiScaleAttention", "qkv", 16, 16, 4, inputs=(GRID,)),
        module(
            "models.mvitv2",
            "MultiScaleAttention",
            "qkv",
            *(16, 16, (2, 2), 4),
            inputs=(X, [2, 2]),
            rel_pos_type="",
            residual_pooling=False,
        ),
        module("models.xcit", "XCA", "qkv", 16, 4),
        module("models.davit", "ChannelAttention", "qkv", 16, 4, effects="lss"),
        module("models.davit", "ChannelAttentionV2", "qkv", 16, 4),
        module("models.cait", "TalkingHeadAttn", "qkv", 16, 4),
        module("models.convit", "MHSA", "qkv", 16, 4),
        module("models.vision_transformer_relpos", "RelPosAttention", "qkv", 16, 4),
        module(
            "models.coat",
            "FactorAttnConvRelPosEnc",
            "qkv",
            *(16, 4),
            inputs=(WITH_CLASS, (2, 2)),
            effects="lsl",
            shared_crpe=timm.models.coat.ConvRelPosEnc(4, 4, {3: 4}),
        ),
        module("models.edgenext", "CrossCovarianceAttn", "qkv", 16, 4),
        module("models.twins", "LocallyGroupedAttn", "qkv", 16, 4, ws=2, inputs=(X, (2, 2))),
        module(
            "layers.attention_pool2d", "AttentionPool2d", "qkv", 16, 2, head_dim=4, inputs=(CHANNELS_FIRST,)
        ),
        module(
            "layers.attention_pool2d", "RotAttentionPool2d", "qkv", 16, head_dim=4, inputs=(CHANNELS_FIRST,)
        ),
        module("models.pvt_v2", "Attention", "kv", 16, 4, inputs=(X, [2, 2]), view=PAIR, effects="sl"),
        module("models.volo", "ClassAttention", "kv", 16, 4, view=PAIR, effects="sl"),
        module(
            "models.twins", "GlobalSubSampleAttn", "kv", 16, 4, inputs=(X, (2, 2)), view=PAIR, effects="sl"
        ),
        module(
            "layers.attention_pool",
            "AttentionPoolLatent",
            "kv",
            *(16, 16, 16, 4),
            view=PAIR,
            effects="sl",
            seen="proj",
        ),
        module("models.convit", "GPSA", "qk", 16, 4, view=PAIR, effects="ss"),
        module("models.tnt", "Attention", "qk", 16, 16, 4, view=PAIR, effects="ss"),
        module(
            "models.vision_transformer",
            "ParallelScalingBlock",
            "in_proj",
            *(16, 4),
            view=("rows", (64, 16, 16, 16)),
            effects="-ssl",
            seen="attn_out_proj",
        ),
        module(
            "models.vision_transformer",
            "DiffParallelScalingBlock",
            "in_proj",
            *(16, 4),
            view=("rows", (64, 16, 16, 16)),
            effects="-ssl",
            seen="sub_norm",
        ),
        # Up times the gate's sigmoid, and SwiGLU.
        module("layers.mlp", "GluMlp", "fc1", 16, 32, view=PAIR, effects="ls"),
        model("vit_giant_patch14_dinov2", "GluMlp.fc1", PAIR, "0l", mlp_ratio=2.0),
    ]
)


@pytest.fixture(autouse=True)
def _in_float64():
    """ConViT makes a table in the default dtype as it is called."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_the_separate_matrices_and_no_others_have_the_effects_of_the_formula(name: str):
    check(name, CASES[name])


def test_every_class_in_the_table_of_known_layouts_has_a_case():
    assert without_case("timm", CASES) == []
