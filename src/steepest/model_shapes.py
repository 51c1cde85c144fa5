"""Parameter names and shapes of real models, from their published architectures.

A plan or a benchmark of optimizers needs no more, so nothing is downloaded and no module is built. Linear
layers have ``nn.Linear``'s layout [out, in], even GPT-2's, whose published checkpoints use [in, out].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["MODELS", "ModelShapes", "ParamShape", "Shape", "gpt2_blocks", "model_shapes"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ParamShape:
    """Name and shape of a parameter; for a hidden layer's matrix, also the index of its block."""

    name: str
    shape: Shape
    block: int | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelShapes:
    """The parameter shapes of a model; tied parameters appear once."""

    name: str
    title: str
    tensors: tuple[ParamShape, ...]

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def blocks(self) -> int:
        """Number of repeated blocks."""
        return 1 + max((t.block for t in self.tensors if t.block is not None), default=-1)

    def hidden(self, blocks: int | None = None) -> tuple[ParamShape, ...]:
        """Return the matrices of hidden layers of the first ``blocks`` blocks, by default of all."""
        return tuple(t for t in self.tensors if t.block is not None and (blocks is None or t.block < blocks))


def _gpt2(width: int, depth: int, vocabulary: int = 50257, context: int = 1024) -> Iterator[ParamShape]:
    """GPT-2 (Radford et al. 2019), the output layer tied to the embedding."""
    yield ParamShape("wte.weight", (vocabulary, width))
    yield ParamShape("wpe.weight", (context, width))
    for block in range(depth):
        yield from _block(f"h.{block}", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj ln_1 ln_2", width, block)
    yield from _layer("ln_f", width)


def _block(prefix: str, names: str, width: int, block: int) -> Iterator[ParamShape]:
    """Four linear layers of a transformer's block, with a fused one for attention's inputs, and its norms."""
    *layers, first, second = (f"{prefix}.{name}" for name in names.split())
    sizes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    for layer, (out, into) in zip(layers, sizes, strict=True):
        yield from _layer(layer, out, into, block=block)
    yield from _layer(first, width)
    yield from _layer(second, width)


def _layer(name: str, *shape: int, block: int | None = None) -> Iterator[ParamShape]:
    """A weight and a bias: of a norm, a linear layer or a convolution."""
    yield ParamShape(f"{name}.weight", shape, block)
    yield ParamShape(f"{name}.bias", shape[:1])


def gpt2_blocks(width: int, depth: int) -> tuple[ParamShape, ...]:
    """Return the hidden matrices of a GPT-2 of any size."""
    return tuple(tensor for tensor in _gpt2(width, depth, 1, 1) if tensor.block is not None)


def _resnet18() -> Iterator[ParamShape]:
    """ResNet-18 for ImageNet (He et al. 2015) with torchvision's names."""
    yield ParamShape("conv1.weight", (64, 3, 7, 7))
    yield from _layer("bn1", 64)
    width = 64
    for stage, out in enumerate((64, 128, 256, 512)):
        for half in range(2):
            prefix, block = f"layer{stage + 1}.{half}", 2 * stage + half
            yield ParamShape(f"{prefix}.conv1.weight", (out, width, 3, 3), block)
            yield from _layer(f"{prefix}.bn1", out)
            yield ParamShape(f"{prefix}.conv2.weight", (out, out, 3, 3), block)
            yield from _layer(f"{prefix}.bn2", out)
            if width != out:
                yield ParamShape(f"{prefix}.downsample.0.weight", (out, width, 1, 1), block)
                yield from _layer(f"{prefix}.downsample.1", out)
            width = out
    yield from _layer("fc", 1000, 512)


def _vit_s16() -> Iterator[ParamShape]:
    """ViT-S/16 at 224 pixels with 1000 classes (Touvron et al. 2021) and timm's names."""
    width = 384
    yield ParamShape("cls_token", (1, 1, width))
    yield ParamShape("pos_embed", (1, 1 + 14 * 14, width))
    yield from _layer("patch_embed.proj", width, 3, 16, 16)
    for block in range(12):
        yield from _block(f"blocks.{block}", "attn.qkv attn.proj mlp.fc1 mlp.fc2 norm1 norm2", width, block)
    yield from _layer("norm", width)
    yield from _layer("head", 1000, width)


def _llama(width: int, inner: int, keys: int, depth: int, vocabulary: int) -> Iterator[ParamShape]:
    """Grouped-query attention, gated MLP, no biases, untied embedding."""
    yield ParamShape("embed_tokens.weight", (vocabulary, width))
    for block in range(depth):
        prefix = f"layers.{block}"
        for layer, out, into in (
            ("self_attn.q_proj", width, width),
            ("self_attn.k_proj", keys, width),
            ("self_attn.v_proj", keys, width),
            ("self_attn.o_proj", width, width),
            ("mlp.gate_proj", inner, width),
            ("mlp.up_proj", inner, width),
            ("mlp.down_proj", width, inner),
        ):
            yield ParamShape(f"{prefix}.{layer}.weight", (out, into), block)
        yield ParamShape(f"{prefix}.input_layernorm.weight", (width,))
        yield ParamShape(f"{prefix}.post_attention_layernorm.weight", (width,))
    yield ParamShape("norm.weight", (width,))
    yield ParamShape("lm_head.weight", (vocabulary, width))


# TinyLlama 1.1B: Zhang et al. 2024. Llama 3 70B: Grattafiori et al. 2024.
_MODELS: dict[str, tuple[str, Callable[[], Iterator[ParamShape]]]] = {
    "tiny": ("toy GPT-2", lambda: _gpt2(32, 2, 128, 32)),
    "resnet18": ("ResNet-18", _resnet18),
    "vit-s16": ("ViT-S/16", _vit_s16),
    "gpt2-124m": ("GPT-2 124M", lambda: _gpt2(768, 12)),
    "gpt2-350m": ("GPT-2 350M", lambda: _gpt2(1024, 24)),
    "gpt2-774m": ("GPT-2 774M", lambda: _gpt2(1280, 36)),
    "llama-1b": ("Llama-style 1.1B", lambda: _llama(2048, 5632, 256, 22, 32000)),
    "gpt2-1.5b": ("GPT-2 1.5B", lambda: _gpt2(1600, 48)),
    "llama-70b": ("Llama 3 70B", lambda: _llama(8192, 28672, 1024, 80, 128256)),
}

MODELS = tuple(_MODELS)
"""The models' names, from small to large."""


def model_shapes(name: str) -> ModelShapes:
    """Return the shapes of a model.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in _MODELS:
        raise ValueError(f"no model {name!r}; there are {', '.join(MODELS)}")
    title, tensors = _MODELS[name]
    return ModelShapes(name, title, tuple(tensors()))
