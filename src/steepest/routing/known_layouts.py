"""Find how the fused weights of Hugging Face's and timm's modules are laid out, by class name and attributes.

A class counts as one of theirs if it, or a base class, is defined in their package: elsewhere a name such as
``Attention`` tells nothing, and explain() asks. Where the sizes do not add up to the weight's, it is another
version of the class than the ones known here, and explain() asks, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from steepest.routing.tensors import Owner
from steepest.views import View, along, interleaved, is_transposed, transposed

__all__ = ["find_fused", "has_own_layout"]

# The number of repetitions, and the sizes of the parts of one: (12, (64, 64, 64)) for 12 heads' three each.
Parts = tuple[int, tuple[int, ...]]
_Layout = Callable[[Any, int], "Parts | None"]

_QKV = "query, key and value fused"
_GATE_UP = "gate and up fused"
_ANY = re.compile(".*")


def find_fused(model: nn.Module, owner: Owner, param: Tensor, view: View | None) -> tuple[View, str] | None:
    """Return the view and a phrase for a weight that is known to be several matrices; None for others.

    Args:
        model: the model.
        owner: of the parameter.
        param: the weight of a linear layer, or of experts, with three dimensions.
        view: how it is stored, without any cut: None for [out, in].
    """
    parent, _, name = owner.path.rpartition(".")
    experts = param.dim() == 3
    module: Any = owner.module if experts else model.get_submodule(parent)
    local = owner.local if experts else name
    for package, classes, names, layout, words in _KNOWN:
        if not (names.fullmatch(local) and _is_of(module, package, classes)):
            continue
        dim = param.dim() - (1 if is_transposed(view) else 2)
        found = layout(module, param.shape[dim])
        if found is None:
            return None
        times, sizes = found
        if times * sum(sizes) != param.shape[dim] or min(sizes) < 1:
            return None
        fused = interleaved(times, along(dim, *sizes))
        return (transposed(fused) if is_transposed(view) else fused), words
    return None


def has_own_layout(model: nn.Module, owner: Owner) -> bool:
    """Tell whether a class of these packages owns the layer: then its sizes say nothing about the layout."""
    module = model.get_submodule(owner.path.rpartition(".")[0])
    return any(_is_of(module, package, _ANY) for package in ("transformers", "timm"))


def _is_of(module: nn.Module, package: str, classes: re.Pattern[str]) -> bool:
    return any(
        each.__module__.partition(".")[0] == package and classes.fullmatch(each.__name__)
        for each in type(module).__mro__
    )


# -- layouts


def _equal(count: int) -> _Layout:
    """One after another, all of one size."""
    return lambda module, outputs: None if outputs % count else (1, (outputs // count,) * count)


def _by_head(module: Any, outputs: int) -> Parts | None:
    """Query, key and value of one head, then of the next."""
    heads = _number(module, "num_heads", "num_attention_heads")
    return None if heads is None or outputs % (3 * heads) else (heads, (outputs // (3 * heads),) * 3)


def _grouped(module: Any, outputs: int) -> Parts | None:
    """All heads' queries, then the keys of the fewer key heads, then their values."""
    heads = _number(module, "num_heads", "num_attention_heads")
    size, fewer = _number(module, "head_dim"), _number(module, "num_key_value_heads")
    if heads is None or size is None:
        return None
    fewer = fewer or heads
    return 1, (heads * size, fewer * size, fewer * size)


def _falcon(module: Any, outputs: int) -> Parts | None:
    heads, size = _number(module, "num_heads"), _number(module, "head_dim")
    if heads is None or size is None:
        return None
    if module.new_decoder_architecture:  # a key head with its queries before it and its value behind it
        groups = module.num_kv_heads
        return groups, (heads // groups * size, size, size)
    return (1, (heads * size, size, size)) if module.multi_query else _by_head(module, outputs)


def _bigcode(module: Any, outputs: int) -> Parts | None:
    if module.is_cross_attention:
        return None
    if module.multi_query:
        return 1, (module.embed_dim, module.kv_dim, module.kv_dim)
    return _by_head(module, outputs)


def _gpt2(module: Any, outputs: int) -> Parts | None:
    # A cross-attention's has keys and values only.
    return _equal(2 if getattr(module, "is_cross_attention", False) else 3)(module, outputs)


def _codegen(module: Any, outputs: int) -> Parts | None:
    """Query, value and key of a quarter of the heads, then of the next: made on four devices."""
    return None if outputs % 12 else (4, (outputs // 12,) * 3)


def _delta_net(module: Any, outputs: int) -> Parts | None:
    """All heads' queries, then the keys, then the values."""
    return 1, (module.key_dim, module.key_dim, module.value_dim)


def _delta_net_by_key_head(module: Any, outputs: int) -> Parts | None:
    """Query and key of a key head, then its values and their gates; then of the next."""
    heads, size = module.num_k_heads, module.head_k_dim
    values = module.value_dim // heads
    return heads, (size, size, values, values)


def _experts(module: Any, outputs: int) -> Parts | None:
    """Gate and up, one after the other or column by column."""
    joined = getattr(module, "is_concatenated", type(module).__name__ != "GptOssExperts")
    return _gate_up(module, outputs) if joined else (outputs // 2, (1, 1))


def _gate_up(module: Any, outputs: int) -> Parts | None:
    """Gate and up, one after the other, if both have as many outputs as the next layer has inputs."""
    following = getattr(module, "down_proj", None)
    following = getattr(following, "weight", following)
    if isinstance(following, Tensor) and outputs // 2 not in following.shape:
        return None
    return _equal(2)(module, outputs)


def _timm_qkv(module: Any, outputs: int) -> Parts | None:
    """Query, key and value one after another, except in the classes whose attributes say otherwise."""
    key, value = _number(module, "key_dim"), _number(module, "val_dim")
    if key is not None and value is not None:  # TinyViT and EfficientFormer
        heads = _number(module, "num_heads")
        return None if heads is None else (heads, (key, key, value))
    if getattr(module, "head_first", False):  # MaxViT's AttentionCl
        return _by_head(module, outputs)
    # GC ViT's has keys and values only where the query is global.
    return _equal(2 if getattr(module, "use_global", False) else 3)(module, outputs)


def _in_split(module: Any, outputs: int) -> Parts | None:
    return 1, tuple(map(int, module.in_split))


def _number(module: Any, *names: str) -> int | None:
    """Return the first attribute, of the module or its config, that is a positive integer."""
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if type(value) is int and value > 0:
                return value
    return None


def _known(package: str, classes: str, names: str, layout: _Layout, words: str = _QKV) -> tuple[Any, ...]:
    return package, re.compile(classes), re.compile(names), layout, words


# (package, classes, name of the weight or of its layer, layout, what is in it), the first that matches. The
# tests want a case for each alternative between the bars, so spell similar names out instead of grouping.
_KNOWN = (
    _known(
        "transformers",
        "GPTNeoXAttention|GPTNeoXJapaneseAttention|BloomAttention|PersimmonAttention",
        "query_key_value",
        _by_head,
    ),
    _known("transformers", "FalconAttention", "query_key_value", _falcon),
    _known(
        "transformers", "GPT2Attention|DecisionTransformerGPT2Attention|ImageGPTAttention", "c_attn", _gpt2
    ),
    _known("transformers", "Attention", "c_attn", _equal(3)),  # the first GPT
    _known("transformers", "GPTBigCodeAttention", "c_attn", _bigcode),
    _known("transformers", "CodeGenAttention", "qkv_proj", _codegen),
    _known("transformers", "DisentangledSelfAttention", "in_proj", _by_head),  # DeBERTa's
    _known(
        "transformers",
        "Qwen3NextGatedDeltaNet",
        "in_proj_qkvz",
        _delta_net_by_key_head,
        "query, key, value and gate fused",
    ),
    _known(
        "transformers",
        "Qwen3_5GatedDeltaNet|Qwen3_5MoeGatedDeltaNet|Qwen4ExpTextGatedDeltaNet",
        "in_proj_qkv",
        _delta_net,
    ),
    _known("transformers", "MiniMaxLightningAttention", "qkv_proj", _by_head),
    _known("transformers", "Phi3Attention|Phi4MultimodalAttention", "qkv_proj", _grouped),
    _known("transformers", "DbrxAttention", "Wqkv", _grouped),
    _known("transformers", "MptAttention|ModernBertAttention", "Wqkv", _equal(3)),
    _known(
        "transformers",
        r"\w*VisionAttention|BlipAttention|Blip2Attention|InstructBlipAttention|InstructBlipVideoAttention|"
        "Florence2VisionChannelAttention|Florence2VisionWindowAttention|HieraMaskUnitAttention|"
        "MgpstrAttention|Sam2MultiScaleAttention|SegGptAttention|TimesformerSelfAttention|VitDetAttention|"
        "PPOCRV5ServerRecAttention|PPOCRV5MobileRecAttention|PPOCRV6SmallRecAttention",
        "qkv",
        lambda module, outputs: (
            _grouped(module, outputs)
            if hasattr(module, "num_key_value_heads")
            else _equal(3)(module, outputs)
        ),
    ),
    _known("transformers", r"\w*Experts", "gate_up_proj", _experts, _GATE_UP),
    _known("transformers", r"\w+", "gate_up_proj", _gate_up, _GATE_UP),
    _known("transformers", "ModernBertMLP|ModernBertDecoderMLP", "Wi", _equal(2), _GATE_UP),
    _known(
        "timm",
        "Attention|AttentionRope|AttentionCl|DiffAttention|EvaAttention|WindowAttention|"
        "WindowAttentionGlobal|WindowMultiHeadAttention|MaskUnitAttention|MultiScaleAttention|XCA|"
        "ChannelAttention|ChannelAttentionV2|TalkingHeadAttn|MHSA|RelPosAttention|FactorAttnConvRelPosEnc|"
        "CrossCovarianceAttn|LocallyGroupedAttn|AttentionPool2d|RotAttentionPool2d",
        "qkv",
        _timm_qkv,
    ),
    _known(
        "timm",
        "Attention|ClassAttention|GlobalSubSampleAttn|AttentionPoolLatent",
        "kv",
        _equal(2),
        "key and value fused",
    ),
    _known("timm", "GPSA|Attention", "qk", _equal(2), "query and key fused"),
    _known(
        "timm",
        "ParallelScalingBlock|DiffParallelScalingBlock",
        "in_proj",
        _in_split,
        "MLP, query, key and value fused",
    ),
    _known("timm", "GluMlp", "fc1", _equal(2), _GATE_UP),
)
