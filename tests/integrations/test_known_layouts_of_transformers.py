"""The views that build() knows for transformers' weights, against its modules' own forward passes."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from steepest.views import View

from .known_layouts import Alone, Case, check, without_case

transformers = pytest.importorskip("transformers")

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(1, 4, 16, generator=DRAW, dtype=torch.float64)
OTHER = X.flip(1)
GRID = X.view(1, 2, 2, 16)
ROTARY = torch.randn(2, 4, 4, generator=DRAW, dtype=torch.float64).unbind()
PACKED = (X[0], torch.tensor([0, 4]))
ROUTED = (X[0], torch.arange(3).expand(4, 3), torch.rand(4, 3, generator=DRAW, dtype=torch.float64))
TOKENS = torch.arange(3, 8).view(1, 5)

EQUAL, BY_HEAD, GROUPED = ("rows", (16, 16, 16)), ("rows", (4, 4, 4), 4), ("rows", (16, 8, 8))
CONV1D, CONV1D_PAIR = ("columns", (16, 16, 16), "transposed"), ("columns", (16, 16), "transposed")
PAIR, EXPERTS_PAIR = ("rows", (24, 24)), ("columns", (24, 24))
EAGER = {
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}  # torch groups no float64 products
SIZES = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24, **EAGER}
WIDE = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LM = {**WIDE, **SIZES, "num_hidden_layers": 1}
LLAMA = {**LM, "num_key_value_heads": 2}
GPT2 = {**WIDE, "n_embd": 16, "n_head": 4, "n_layer": 1, "n_positions": 8, **EAGER}
MOE = {**LLAMA, "num_experts_per_tok": 3, "num_local_experts": 3}
DELTA = {
    **LLAMA,
    "head_dim": 4,
    "layer_types": ["linear_attention"],
    "use_cache": False,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 3,
    "linear_value_head_dim": 5,
    "num_experts": 0,
}


def model(
    name: str,
    of: str,
    view: View,
    effects: str,
    sizes: dict[str, Any],
    *,
    head: str = "ForCausalLM",
    seen: str = "",
    **options: Any,
) -> tuple[str, Case]:
    """The name and the case of a causal language model."""

    def make() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**{**sizes, **options})
        return getattr(transformers, name.removesuffix("Text") + head)(config)

    variant = "".join(f", {name}={value}" for name, value in options.items() if isinstance(value, bool))
    return f"{of}{variant}", Case(make, (TOKENS,), view, effects, seen)


def module(
    package: str,
    kind: str,
    weight: str,
    config: str | None,
    *more: Any,
    inputs: tuple[Any, ...] = (X,),
    view: View = EQUAL,
    effects: str = "ssl",
    **options: Any,
) -> tuple[str, Case]:
    """The name and the case of one module, made of a configuration, if it takes one, and of what follows."""

    def make() -> nn.Module:
        source = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
        given = () if config is None else (getattr(transformers, config)(**{**SIZES, **options}),)
        return Alone(getattr(source, kind)(*given, *more))

    variant = ", cross-attention" if more == (True,) else ""
    return f"{kind}.{weight}{variant}", Case(make, inputs, view, effects)


def packed(package: str, kind: str, config: str = "", view: View = EQUAL, **options: Any) -> tuple[str, Case]:
    """The name and the case of an attention over images of many sizes, one after another."""
    sizes = {"embed_dim": 16, "num_heads": 4, **options}
    config = config or kind.replace("Attention", "Config")
    inputs = PACKED if kind == "GlmImageVisionAttention" else (*PACKED, ROTARY)
    return module(package, kind, "qkv", config, inputs=inputs, view=view, **sizes)


def sam(package: str, kind: str) -> tuple[str, Case]:
    """The name and the case of an attention in windows of SAM's encoder."""
    config = kind.replace("Attention", "Config")
    return module(package, kind, "qkv", config, 2, inputs=(GRID,), use_rel_pos=False)


CASES = dict(
    [
        # Query, key and value of language models.
        model("GPTNeoX", "GPTNeoXAttention.query_key_value", BY_HEAD, "ssl", LM),
        model(
            "GPTNeoXJapanese",
            "GPTNeoXJapaneseAttention.query_key_value",
            BY_HEAD,
            "ssl",
            LM,
            intermediate_multiple_size=2,
        ),
        model(
            "Bloom", "BloomAttention.query_key_value", BY_HEAD, "ssl", LM, n_head=4, n_layer=1, seen="dense"
        ),
        model("Persimmon", "PersimmonAttention.query_key_value", BY_HEAD, "ssl", LM),
        model("Falcon", "FalconAttention.query_key_value", BY_HEAD, "ssl", LM, multi_query=False),
        model("Falcon", "FalconAttention.query_key_value", ("rows", (16, 4, 4)), "ssl", LM, multi_query=True),
        model(
            "Falcon",
            "FalconAttention.query_key_value",
            ("rows", (8, 4, 4), 2),
            "ssl",
            LM,
            new_decoder_architecture=True,
            num_kv_heads=2,
        ),
        module("gpt2", "GPT2Attention", "c_attn", "GPT2Config", view=CONV1D, n_positions=8),
        module(
            *("gpt2", "GPT2Attention", "c_attn", "GPT2Config", True),
            inputs=(X, None, None, OTHER),
            view=CONV1D_PAIR,
            effects="sl",
        ),
        module(
            *(
                "decision_transformer",
                "DecisionTransformerGPT2Attention",
                "c_attn",
                "DecisionTransformerConfig",
            ),
            view=CONV1D,
        ),
        module(
            *(
                "decision_transformer",
                "DecisionTransformerGPT2Attention",
                "c_attn",
                "DecisionTransformerConfig",
            ),
            True,
            inputs=(X, None, None, OTHER),
            view=CONV1D_PAIR,
            effects="sl",
        ),
        module("imagegpt", "ImageGPTAttention", "c_attn", "ImageGPTConfig", view=CONV1D, n_positions=8),
        model("OpenAIGPT", "Attention.c_attn", CONV1D, "ssl", GPT2, head="LMHeadModel"),
        model("GPTBigCode", "GPTBigCodeAttention.c_attn", BY_HEAD, "ssl", GPT2, multi_query=False),
        model(
            "GPTBigCode", "GPTBigCodeAttention.c_attn", ("rows", (16, 4, 4)), "ssl", GPT2, multi_query=True
        ),
        # Query, value and key.
        model(
            "CodeGen",
            "CodeGenAttention.qkv_proj",
            ("rows", (8, 8, 8), 4),
            "sls",
            {**GPT2, "n_embd": 32, "rotary_dim": 4, "n_ctx": 8},
        ),
        module(
            *("deberta", "DisentangledSelfAttention", "in_proj", "DebertaConfig"),
            inputs=(X, torch.ones(1, 1, 4, 4, dtype=torch.bool)),
            view=BY_HEAD,
        ),
        # Its activation follows the layer, so that the output is linear in none.
        module(
            *("minimax", "MiniMaxLightningAttention", "qkv_proj", "MiniMaxConfig", 0),
            inputs=(X, None, None),
            view=BY_HEAD,
            effects="000",
            layer_types=["linear_attention"],
            num_hidden_layers=1,
        ),
        model("Qwen3Next", "Qwen3NextGatedDeltaNet.in_proj_qkvz", ("rows", (3, 3, 10, 10), 2), "0000", DELTA),
        model("Qwen3_5Text", "Qwen3_5GatedDeltaNet.in_proj_qkv", ("rows", (6, 6, 20)), "000", DELTA),
        module(
            *("qwen3_5_moe", "Qwen3_5MoeGatedDeltaNet", "in_proj_qkv", "Qwen3_5MoeTextConfig", 0),
            view=("rows", (6, 6, 20)),
            effects="000",
            **DELTA,
        ),
        module(
            *("qwen4_exp", "Qwen4ExpTextGatedDeltaNet", "in_proj_qkv", "Qwen4ExpTextConfig", 0),
            view=("rows", (6, 6, 20)),
            effects="000",
            **{**DELTA, "num_experts": 1, "num_experts_per_tok": 1},
        ),
        model("Phi3", "Phi3Attention.qkv_proj", GROUPED, "ssl", LLAMA),
        module(
            *("phi4_multimodal", "Phi4MultimodalAttention", "qkv_proj", "Phi4MultimodalConfig", 0),
            inputs=(X, [each[None] for each in ROTARY], None),
            view=GROUPED,
            num_key_value_heads=2,
        ),
        module(
            *("dbrx", "DbrxAttention", "Wqkv", "DbrxConfig", 0),
            inputs=(X, None, [each[None] for each in ROTARY]),
            view=GROUPED,
            d_model=16,
            n_heads=4,
            attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 100.0},
        ),
        model("Mpt", "MptAttention.Wqkv", EQUAL, "ssl", {**WIDE, "d_model": 16, "n_heads": 4, "n_layers": 1}),
        module(
            *("modernbert", "ModernBertAttention", "Wqkv", "ModernBertConfig", 0),
            inputs=(X, [each[None] for each in ROTARY]),
            num_hidden_layers=1,
        ),
        # Query, key and value of vision models.
        packed("qwen2_vl", "VisionAttention", "Qwen2VLVisionConfig"),
        packed("qwen3_omni_moe", "Qwen3OmniMoeVisionAttention", "Qwen3OmniMoeVisionEncoderConfig"),
        packed("exaone4_5", "Exaone4_5_VisionAttention", view=GROUPED, num_key_value_heads=2),
        packed("qwen2_5_vl", "Qwen2_5_VLVisionAttention"),
        packed("qwen3_vl", "Qwen3VLVisionAttention"),
        packed("qwen3_vl_moe", "Qwen3VLMoeVisionAttention"),
        packed("qwen3_5", "Qwen3_5VisionAttention"),
        packed("qwen3_5_moe", "Qwen3_5MoeVisionAttention"),
        packed("qwen4_exp", "Qwen4ExpVisionAttention"),
        packed("glm4v", "Glm4vVisionAttention"),
        packed("glm4v_moe", "Glm4vMoeVisionAttention"),
        packed("glm_image", "GlmImageVisionAttention"),
        packed("glm_ocr", "GlmOcrVisionAttention"),
        packed("glm5_next", "Glm5NextVisionAttention"),
        packed("ernie4_5_vl_moe", "Ernie4_5_VLMoeVisionAttention"),
        packed("cohere_compass", "CohereCompassVisionAttention"),
        packed("dots3_note", "Dots3NoteVisionAttention", adapter_in_dim=16),
        sam("sam", "SamVisionAttention"),
        sam("sam_hq", "SamHQVisionAttention"),
        sam("slanext", "SLANeXtVisionAttention"),
        sam("pp_formulanet", "PPFormulaNetVisionAttention"),
        sam("got_ocr2", "GotOcr2VisionAttention"),
        sam("unlimited_ocr", "UnlimitedOcrSamVisionAttention"),
        sam("deepseek_ocr2", "DeepseekOcr2SamVisionAttention"),
        module("blip", "BlipAttention", "qkv", "BlipVisionConfig"),
        module("blip_2", "Blip2Attention", "qkv", "Blip2VisionConfig"),
        module("instructblip", "InstructBlipAttention", "qkv", "InstructBlipVisionConfig"),
        module("instructblipvideo", "InstructBlipVideoAttention", "qkv", "InstructBlipVideoVisionConfig"),
        module(
            *("florence2", "Florence2VisionChannelAttention", "qkv", "Florence2VisionConfig", 0),
            embed_dim=[16],
            num_groups=[4],
        ),
        module(
            *("florence2", "Florence2VisionWindowAttention", "qkv", "Florence2VisionConfig", 0),
            inputs=(GRID,),
            embed_dim=[16],
            num_heads=[4],
            window_size=2,
        ),
        module("hiera", "HieraMaskUnitAttention", "qkv", None, 16, 16, 4),
        module("mgp_str", "MgpstrAttention", "qkv", "MgpstrConfig"),
        module("sam2", "Sam2MultiScaleAttention", "qkv", "Sam2HieraDetConfig", 16, 16, 4, inputs=(GRID,)),
        module(
            *("seggpt", "SegGptAttention", "qkv", "SegGptConfig"),
            inputs=(GRID,),
            image_size=16,
            patch_size=8,
            use_relative_position_embeddings=False,
        ),
        module("timesformer", "TimesformerSelfAttention", "qkv", "TimesformerConfig"),
        module("vitdet", "VitDetAttention", "qkv", "VitDetConfig", inputs=(GRID,)),
        module("pp_ocrv5_server_rec", "PPOCRV5ServerRecAttention", "qkv", "PPOCRV5ServerRecConfig"),
        module("pp_ocrv5_mobile_rec", "PPOCRV5MobileRecAttention", "qkv", "PPOCRV5MobileRecConfig"),
        module("pp_ocrv6_small_rec", "PPOCRV6SmallRecAttention", "qkv", "PPOCRV6SmallRecConfig"),
        # Gate and up.
        model("Phi3", "Phi3MLP.gate_up_proj", PAIR, "0l", LLAMA),
        model("Glm", "GlmMLP.gate_up_proj", PAIR, "0l", LLAMA, head_dim=4),
        module("glm4", "Glm4MLP", "gate_up_proj", "Glm4Config", view=PAIR, effects="0l"),
        module("dia", "DiaMLP", "gate_up_proj", "DiaDecoderConfig", view=PAIR, effects="0l"),
        module("esmfold2", "EsmFold2SwiGLU", "gate_up_proj", None, 16, 24, view=PAIR, effects="0l"),
        module(
            *("dots3_note", "Dots3NoteAudioMLP", "gate_up_proj", "Dots3NoteAudioConfig"),
            view=PAIR,
            effects="0l",
            adapter_input_size=16,
        ),
        # Up and gate.
        module(
            *("phi4_multimodal", "Phi4MultimodalAudioMLP", "gate_up_proj", "Phi4MultimodalAudioConfig"),
            view=PAIR,
            effects="l0",
        ),
        # (up + 1)·gate, and both are clamped.
        module(
            *("minimax_m3_vl", "MiniMaxM3VLDenseMLP", "gate_up_proj", "MiniMaxM3VLTextConfig", 24),
            view=PAIR,
            effects="0s",
        ),
        module(
            *(
                "openai_privacy_filter",
                "OpenAIPrivacyFilterExperts",
                "gate_up_proj",
                "OpenAIPrivacyFilterConfig",
            ),
            inputs=ROUTED,
            view=("dim 2", (24, 24), "transposed"),
            effects="0s",
            num_local_experts=3,
        ),
        model(
            "GptOss", "GptOssExperts.gate_up_proj", ("dim 2", (1, 1), 24, "transposed"), "0s", MOE, head_dim=4
        ),
        model(
            "Llama4Text",
            "Llama4TextExperts.gate_up_proj",
            ("dim 2", (24, 24), "transposed"),
            "0l",
            MOE,
            intermediate_size_mlp=24,
            head_dim=4,
        ),
        module(
            *("aria", "AriaExperts", "gate_up_proj", "AriaTextConfig"),
            inputs=ROUTED,
            view=("dim 2", (24, 24), "transposed"),
            effects="0l",
            moe_num_experts=3,
        ),
        model("Mixtral", "MixtralExperts.gate_up_proj", EXPERTS_PAIR, "0l", MOE),
        model(
            "Qwen3Moe",
            "Qwen3MoeExperts.gate_up_proj",
            EXPERTS_PAIR,
            "0l",
            MOE,
            num_experts=3,
            moe_intermediate_size=24,
            head_dim=4,
        ),
        module("modernbert", "ModernBertMLP", "Wi", "ModernBertConfig", view=PAIR, effects="0l"),
        module(
            "modernbert_decoder",
            "ModernBertDecoderMLP",
            "Wi",
            "ModernBertDecoderConfig",
            view=PAIR,
            effects="0l",
        ),
    ]
)


@pytest.mark.parametrize("name", CASES)
def test_the_separate_matrices_and_no_others_have_the_effects_of_the_formula(name: str):
    check(name, CASES[name])


def test_every_class_in_the_table_of_known_layouts_has_a_case():
    assert without_case("transformers", CASES) == []
