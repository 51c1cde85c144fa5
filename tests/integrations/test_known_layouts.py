"""The views that build() knows for Hugging Face's and timm's weights, against their modules' forward pass.

Nobody says here how a weight is laid out: the models' own code does. Where an attention calls torch's scaled
dot product, what it passes must be the products with the separate matrices. Elsewhere, and for gates, the
module's output must depend on each matrix as its part in the formula demands, which no other cut does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.views import cut, matrices

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")
timm.layers.set_fused_attn(True, experimental=True)

WIDE = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **WIDE,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}
EAGER = {"experts_implementation": "eager"}  # torch has no grouped products in float64
EXPERTS = {"num_experts_per_tok": 3, "num_local_experts": 3, **EAGER}


def language(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**options)
    )


def gpt2(
    kind: str = "GPT2LMHeadModel", config: str = "GPT2Config", **options: Any
) -> Callable[[], nn.Module]:
    sizes = {**WIDE, "n_embd": 16, "n_head": 4, "n_layer": 1, "n_positions": 8, **options}
    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**sizes))


def image(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=3, **options)


def falcon(**options: Any) -> Callable[[], nn.Module]:
    return language("Falcon", **WIDE, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, **options)


NEOX = {**WIDE, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 4}

# Those that call torch's scaled dot product: model, name of the weight, its view.
PRODUCTS: dict[str, tuple[Callable[[], nn.Module], str, Any]] = {
    "gpt2": (gpt2(), "attn.c_attn", ("columns", (16, 16, 16), "transposed")),
    "bigcode": (
        gpt2("GPTBigCodeForCausalLM", "GPTBigCodeConfig", multi_query=False),
        "c_attn",
        ("rows", (4, 4, 4), 4),
    ),
    "bigcode, one key": (gpt2("GPTBigCodeForCausalLM", "GPTBigCodeConfig"), "c_attn", ("rows", (16, 4, 4))),
    "gpt-neox": (language("GPTNeoX", **NEOX), "query_key_value", ("rows", (4, 4, 4), 4)),
    "falcon": (falcon(multi_query=False), "query_key_value", ("rows", (4, 4, 4), 4)),
    "falcon, one key": (falcon(multi_query=True), "query_key_value", ("rows", (16, 4, 4))),
    "falcon, grouped": (
        falcon(new_decoder_architecture=True, num_kv_heads=2),
        "query_key_value",
        ("rows", (8, 4, 4), 2),
    ),
    "phi-3": (language("Phi3", **LLAMA), "qkv_proj", ("rows", (16, 8, 8))),
    "dbrx": (
        language(
            "Dbrx",
            **WIDE,
            d_model=16,
            n_heads=4,
            n_layers=1,
            max_seq_len=8,
            attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 100.0},
            ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 2, "moe_top_k": 1},
        ),
        "Wqkv",
        ("rows", (16, 8, 8)),
    ),
    "vit": (image("vit_tiny_patch16_224", **VIT), "attn.qkv", ("rows", (16, 16, 16))),
}

# Single modules of timm: class, its sizes, options, name of the weight, its view, more inputs of forward.
MODULES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], str, Any, tuple[Any, ...]]] = {
    "attention": ("layers.attention.Attention", (16, 4), {}, "qkv", ("rows", (16, 16, 16)), ()),
    "rope": ("layers.attention.AttentionRope", (16, 4), {}, "qkv", ("rows", (16, 16, 16)), ()),
    "beit": ("models.beit.Attention", (16, 4), {}, "qkv", ("rows", (16, 16, 16)), ()),
    "eva": (
        "models.eva.EvaAttention",
        (16, 4),
        {"qkv_bias": False, "scale_norm": False},
        "qkv",
        ("rows", (16, 16, 16)),
        (),
    ),
    "swin": (
        "models.swin_transformer.WindowAttention",
        (16, 4),
        {"window_size": (2, 2)},
        "qkv",
        ("rows", (16, 16, 16)),
        (),
    ),
    "maxvit, heads first": ("models.maxxvit.AttentionCl", (16, 16, 4), {}, "qkv", ("rows", (4, 4, 4), 4), ()),
    "maxvit": (
        "models.maxxvit.AttentionCl",
        (16, 16, 4),
        {"head_first": False},
        "qkv",
        ("rows", (16, 16, 16)),
        (),
    ),
    "tiny_vit": (
        "models.tiny_vit.Attention",
        (16, 4, 4),
        {"attn_ratio": 2, "resolution": (2, 2)},
        "qkv",
        ("rows", (4, 4, 8), 4),
        (),
    ),
    "pvt": ("models.pvt_v2.Attention", (16, 4), {}, "kv", ("rows", (16, 16)), ([2, 2],)),
    "latent pool": (
        "layers.attention_pool.AttentionPoolLatent",
        (16,),
        {"num_heads": 4},
        "kv",
        ("rows", (16, 16)),
        (),
    ),
    "parallel block": (
        "models.vision_transformer.ParallelScalingBlock",
        (16, 4),
        {},
        "in_proj",
        ("rows", (64, 16, 16, 16)),
        (),
    ),
}

# Those that multiply by themselves: model, name of the weight, its view, the layer that takes the result.
ATTENTIONS: dict[str, tuple[Callable[[], nn.Module], str, Any, str]] = {
    "bloom": (
        language("Bloom", **WIDE, hidden_size=16, n_layer=1, n_head=4),
        "query_key_value",
        ("rows", (4, 4, 4), 4),
        "dense",
    ),
    "gpt-neox-japanese": (
        language("GPTNeoXJapanese", **{**NEOX, "intermediate_multiple_size": 2}),
        "query_key_value",
        ("rows", (4, 4, 4), 4),
        "attention.dense",
    ),
    "deberta": (
        lambda: transformers.DebertaForMaskedLM(
            transformers.DebertaConfig(
                vocab_size=32,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=24,
            )
        ),
        "in_proj",
        ("rows", (4, 4, 4), 4),
        "attention.output.dense",
    ),
    "mpt": (
        language("Mpt", **WIDE, d_model=16, n_heads=4, n_layers=1),
        "Wqkv",
        ("rows", (16, 16, 16)),
        "out_proj",
    ),
    "codegen": (
        language("CodeGen", **WIDE, n_embd=32, n_head=4, n_layer=1, rotary_dim=4, n_positions=8, n_ctx=8),
        "qkv_proj",
        ("rows", (8, 8, 8), 4),
        "out_proj",
    ),
    "the first gpt": (
        gpt2("OpenAIGPTLMHeadModel", "OpenAIGPTConfig"),
        "c_attn",
        ("columns", (16, 16, 16), "transposed"),
        "attn.c_proj",
    ),
}

# Linear attention: model, its module, name of the weight, its view.
DELTA = {
    **LLAMA,
    "head_dim": 4,
    "layer_types": ["linear_attention"],
    "use_cache": False,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 3,
    "linear_value_head_dim": 5,
}
DELTA_NETS: dict[str, tuple[Callable[[], nn.Module], str, str, Any]] = {
    "qwen 3 next": (
        language("Qwen3Next", **DELTA, **EAGER, num_experts=0),
        "qwen3_next",
        "in_proj_qkvz",
        ("rows", (3, 3, 10, 10), 2),
    ),
    "qwen 3.5": (
        lambda: transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**DELTA)),
        "qwen3_5",
        "in_proj_qkv",
        ("rows", (6, 6, 20)),
    ),
}

# Gates: model, name of the weight, its view, the module whose input or output shows the product.
GATES: dict[str, tuple[Callable[[], nn.Module], str, Any, str]] = {
    "phi-3": (language("Phi3", **LLAMA), "gate_up_proj", ("rows", (24, 24)), "down_proj"),
    "glm": (language("Glm", **LLAMA, head_dim=4), "gate_up_proj", ("rows", (24, 24)), "down_proj"),
    "gpt-oss": (
        language("GptOss", **LLAMA, **EXPERTS, head_dim=4),
        "gate_up_proj",
        ("dim 2", (1, 1), 24, "transposed"),
        "experts",
    ),
    "llama 4": (
        lambda: transformers.Llama4ForCausalLM(
            transformers.Llama4TextConfig(
                **LLAMA, intermediate_size_mlp=24, num_local_experts=2, num_experts_per_tok=2, head_dim=4
            )
        ),
        "gate_up_proj",
        ("dim 2", (24, 24), "transposed"),
        "experts",
    ),
    "mixtral": (language("Mixtral", **LLAMA, **EXPERTS), "gate_up_proj", ("columns", (24, 24)), "experts"),
    "qwen 3": (
        language(
            "Qwen3Moe",
            **{**LLAMA, **EXPERTS, "num_experts": 3, "moe_intermediate_size": 24, "head_dim": 4},
        ),
        "gate_up_proj",
        ("columns", (24, 24)),
        "experts",
    ),
    "swiglu packed": (
        image("vit_giant_patch14_dinov2", **VIT, mlp_ratio=2.0),
        "mlp.fc1",
        ("rows", (16, 16)),
        "mlp.fc2",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)


def made(make: Callable[[], nn.Module], weight: str, view: Any) -> tuple[nn.Module, str, Any]:
    """The model in float64 with random weights and without biases, the weight's full name, and its view."""
    transformers.logging.set_verbosity_error()
    model = make().double().eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "bias" in name:
                param.zero_()
            elif param.dim() > 1:
                param.normal_(std=0.5)
    explanation = steepest.build(model, "muon").explain()
    row = next(row for row in explanation.rows if row.name.removesuffix(".weight").endswith(weight))
    assert row.view == view or view is None
    assert isinstance(row.view, tuple)
    assert not [text for text in explanation.warnings if "in one" in text and weight.split(".")[-1] in text]
    return model, row.name, row.view


def inputs(model: nn.Module, tokens: int) -> Tensor:
    if hasattr(model, "config"):
        return torch.arange(3, 3 + tokens).view(1, tokens)
    return torch.randn(1, 3, *[model.patch_embed.img_size[0]] * 2, dtype=torch.float64)  # type: ignore


def recorded(model: nn.Module, layer: str, tokens: int, *, output: bool = False) -> Tensor:
    """What a layer is given, or returns, in a forward pass: the last such layer of the model."""
    found = [module for name, module in model.named_modules() if name.endswith(layer)]
    seen: list[Tensor] = []

    def hook(module: nn.Module, given: Any, result: Any) -> None:
        value = result if output else given[0]
        seen.append(value[0] if isinstance(value, tuple) else value)

    with found[-1].register_forward_hook(hook), torch.no_grad():
        torch.manual_seed(1)
        model(inputs(model, tokens))
    return seen[-1].clone()


class Products:
    """Records what scaled dot products are given, and compares it with products of an input."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Tensor, ...]] = []
        real = torch.nn.functional.scaled_dot_product_attention

        def spy(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
            self.calls.append((query, key, value))
            return real(query, key, value, *args, **options)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)

    def include(self, x: Tensor, separate: list[Tensor]) -> bool:
        """Whether a call's last arguments are the products of x with the matrices, by heads."""
        products = [x.reshape(-1, x.shape[-1]) @ matrix.mT for matrix in separate]
        return any(
            all(
                part.numel() % product.numel() == 0 and torch.allclose(rows_of(part, product), product)
                for part, product in zip(call[-len(products) :], products, strict=True)
            )
            for call in self.calls
        )


def rows_of(heads: Tensor, like: Tensor) -> Tensor:
    """[batch, heads, tokens, size] as [batch·tokens, heads·size], each of repeated heads once."""
    repeats = heads.numel() // like.numel()
    return heads[:, ::repeats].transpose(1, 2).reshape(like.shape)


@pytest.mark.parametrize("case", PRODUCTS)
def test_attention_takes_the_products_with_the_separate_matrices(case: str, monkeypatch: pytest.MonkeyPatch):
    """With a single token, since at position 0 rotary embeddings turn nothing."""
    model, name, view = made(*PRODUCTS[case])
    products = Products(monkeypatch)
    x = recorded(model, name.removesuffix(".weight"), tokens=1)
    assert products.include(x, matrices(model.get_parameter(name).detach(), view))


@pytest.mark.parametrize("case", MODULES)
def test_timms_modules_take_the_products_with_the_separate_matrices(
    case: str, monkeypatch: pytest.MonkeyPatch
):
    path, sizes, options, weight, wanted, more = MODULES[case]
    package, _, kind = path.rpartition(".")
    cls = getattr(importlib.import_module(f"timm.{package}"), kind)
    model, name, view = made(lambda: nn.ModuleList([cls(*sizes, **options), nn.Linear(3, 3)]), weight, wanted)
    products, seen = Products(monkeypatch), []
    layer = model.get_submodule(name.removesuffix(".weight"))
    with layer.register_forward_hook(lambda module, given, result: seen.append(given[0])), torch.no_grad():
        model[0](torch.randn(1, 4, 16, dtype=torch.float64), *more)
    separate = matrices(model.get_parameter(name).detach(), view)
    assert products.include(seen[0], separate[-3:])  # a block's first is its MLP's


def changed(
    model: nn.Module, name: str, view: Any, layer: str, factors: dict[int, float], *, output: bool = False
) -> Tensor:
    """What the layer sees when some of the weight's matrices are multiplied by powers of two, or by 0."""
    param = model.get_parameter(name)
    before = param.detach().clone()
    for index, factor in factors.items():
        cut(param.data, view, param.dim() > 2)[index].mul_(factor)
    result = recorded(model, layer, 5, output=output)
    param.data.copy_(before)
    return result


@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_is_linear_in_values_and_sees_products_of_queries_and_keys(case: str):
    make, weight, wanted, layer = ATTENTIONS[case]
    model, name, view = made(make, weight, wanted)
    parts = {index: changed(model, name, view, layer, {index: 2.0}) for index in range(3)}
    plain = changed(model, name, view, layer, {})
    (value,) = [index for index, result in parts.items() if torch.allclose(result, 2 * plain)]
    others = [index for index in range(3) if index != value]
    for index in others:
        assert not torch.allclose(parts[index], plain, rtol=1e-4)
    balanced = changed(model, name, view, layer, {others[0]: 2.0, others[1]: 0.5})
    torch.testing.assert_close(balanced, plain)


@pytest.mark.parametrize("case", DELTA_NETS)
def test_linear_attention_takes_each_part_from_its_matrix_alone(case: str, monkeypatch: pytest.MonkeyPatch):
    """Convolutions and SiLU stand between, which take zeros to zeros."""
    make, package, weight, wanted = DELTA_NETS[case]
    model, name, view = made(make, weight, wanted)
    modeling = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    real, seen = modeling.torch_chunk_gated_delta_rule, []

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        seen.append((query, key, value))
        return real(query, key, value, **options)

    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", spy)
    results = [
        changed(model, name, view, "out_proj", factors) for factors in ({}, *({i: 0.0} for i in range(3)))
    ]
    assert results[0].abs().max() > 1e-6
    plain, *without = seen
    for index, parts in enumerate(without):
        for at, (part, before) in enumerate(zip(parts, plain, strict=True)):
            assert before.abs().max() > 1e-3
            if at == index:
                assert part.abs().max() == 0
            else:
                assert torch.equal(part, before)
    if len(view[1]) > 3:  # the gate
        assert changed(model, name, view, "out_proj", {3: 0.0}).abs().max() == 0


@pytest.mark.parametrize("case", GATES)
def test_the_gates_product_is_zero_without_a_gate_and_linear_in_the_other(case: str):
    make, weight, wanted, layer = GATES[case]
    model, name, view = made(make, weight, wanted)
    output = layer == "experts"
    plain = changed(model, name, view, layer, {}, output=output)
    without = [changed(model, name, view, layer, {index: 0.0}, output=output) for index in range(2)]
    double = [changed(model, name, view, layer, {index: 2.0}, output=output) for index in range(2)]
    assert plain.abs().max() > 1e-3
    if case == "gpt-oss":  # (up + 1)·gate, and both are clamped
        assert without[0].abs().max() == 0
        assert without[1].abs().max() > 1e-3
        return
    assert max(result.abs().max() for result in without) == 0
    linear = [torch.allclose(result, 2 * plain) for result in double]
    assert sorted(linear) == [False, True]
