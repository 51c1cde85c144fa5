"""Parameter names and shapes of real models, from their published architectures.

A benchmark of optimizers needs only names and shapes, so nothing is downloaded and no module is built.
Linear layers have `nn.Linear`'s layout [out, in], even GPT-2's, whose published checkpoints use [in, out].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import LabError

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
        """Number of parameters.

        Example:
            >>> model_shapes("gpt2-124m").numel
            124439808
        """
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def blocks(self) -> int:
        """Number of repeated blocks."""
        return 1 + max((t.block for t in self.tensors if t.block is not None), default=-1)

    def hidden(self, blocks: int | None = None) -> tuple[ParamShape, ...]:
        """Return the matrices of hidden layers of the first `blocks` blocks, by default of all."""
        return tuple(t for t in self.tensors if t.block is not None and (blocks is None or t.block < blocks))


def _gpt2(name: str, title: str, width: int, depth: int, vocabulary: int, context: int) -> ModelShapes:
    def tensors() -> Iterator[ParamShape]:
        yield ParamShape("wte.weight", (vocabulary, width))
        yield ParamShape("wpe.weight", (context, width))
        for block in range(depth):
            prefix = f"h.{block}"
            for linear, out, into in (
                ("attn.c_attn", 3 * width, width),
                ("attn.c_proj", width, width),
                ("mlp.c_fc", 4 * width, width),
                ("mlp.c_proj", width, 4 * width),
            ):
                yield ParamShape(f"{prefix}.{linear}.weight", (out, into), block)
                yield ParamShape(f"{prefix}.{linear}.bias", (out,))
            for norm in ("ln_1", "ln_2"):
                yield ParamShape(f"{prefix}.{norm}.weight", (width,))
                yield ParamShape(f"{prefix}.{norm}.bias", (width,))
        yield ParamShape("ln_f.weight", (width,))
        yield ParamShape("ln_f.bias", (width,))

    return ModelShapes(name, title, tuple(tensors()))


def gpt2_blocks(width: int, depth: int) -> tuple[ParamShape, ...]:
    """Return the hidden matrices of a GPT-2 of any size.

    Example:
        >>> [tensor.shape for tensor in gpt2_blocks(8, 1)]
        [(24, 8), (8, 8), (32, 8), (8, 32)]
    """
    return _gpt2("blocks", "GPT-2 blocks", width, depth, 1, 1).hidden()


def tiny() -> ModelShapes:
    """A tiny GPT-2 for smoke tests."""
    return _gpt2("tiny", "toy GPT-2", 32, 2, 128, 32)


def gpt2_124m() -> ModelShapes:
    """GPT-2 small (Radford et al. 2019): 148 tensors, output layer tied to the embedding."""
    return _gpt2("gpt2-124m", "GPT-2 124M", 768, 12, 50257, 1024)


def gpt2_350m() -> ModelShapes:
    """GPT-2 medium."""
    return _gpt2("gpt2-350m", "GPT-2 350M", 1024, 24, 50257, 1024)


def resnet18() -> ModelShapes:
    """ResNet-18 for ImageNet (He et al. 2015) with torchvision's names."""

    def norm(name: str, width: int) -> Iterator[ParamShape]:
        yield ParamShape(f"{name}.weight", (width,))
        yield ParamShape(f"{name}.bias", (width,))

    def tensors() -> Iterator[ParamShape]:
        yield ParamShape("conv1.weight", (64, 3, 7, 7))
        yield from norm("bn1", 64)
        width = 64
        for stage, out in enumerate((64, 128, 256, 512)):
            for half in range(2):
                prefix, block = f"layer{stage + 1}.{half}", 2 * stage + half
                yield ParamShape(f"{prefix}.conv1.weight", (out, width, 3, 3), block)
                yield from norm(f"{prefix}.bn1", out)
                yield ParamShape(f"{prefix}.conv2.weight", (out, out, 3, 3), block)
                yield from norm(f"{prefix}.bn2", out)
                if width != out:
                    yield ParamShape(f"{prefix}.downsample.0.weight", (out, width, 1, 1), block)
                    yield from norm(f"{prefix}.downsample.1", out)
                width = out
        yield ParamShape("fc.weight", (1000, 512))
        yield ParamShape("fc.bias", (1000,))

    return ModelShapes("resnet18", "ResNet-18", tuple(tensors()))


def vit_s16() -> ModelShapes:
    """ViT-S/16 at 224 pixels with 1000 classes (Touvron et al. 2021) and timm's names."""
    width = 384

    def tensors() -> Iterator[ParamShape]:
        yield ParamShape("cls_token", (1, 1, width))
        yield ParamShape("pos_embed", (1, 1 + 14 * 14, width))
        yield ParamShape("patch_embed.proj.weight", (width, 3, 16, 16))
        yield ParamShape("patch_embed.proj.bias", (width,))
        for block in range(12):
            prefix = f"blocks.{block}"
            for norm in ("norm1", "norm2"):
                yield ParamShape(f"{prefix}.{norm}.weight", (width,))
                yield ParamShape(f"{prefix}.{norm}.bias", (width,))
            for linear, out, into in (
                ("attn.qkv", 3 * width, width),
                ("attn.proj", width, width),
                ("mlp.fc1", 4 * width, width),
                ("mlp.fc2", width, 4 * width),
            ):
                yield ParamShape(f"{prefix}.{linear}.weight", (out, into), block)
                yield ParamShape(f"{prefix}.{linear}.bias", (out,))
        yield ParamShape("norm.weight", (width,))
        yield ParamShape("norm.bias", (width,))
        yield ParamShape("head.weight", (1000, width))
        yield ParamShape("head.bias", (1000,))

    return ModelShapes("vit-s16", "ViT-S/16", tuple(tensors()))


def _llama(
    name: str, title: str, width: int, inner: int, keys: int, depth: int, vocabulary: int
) -> ModelShapes:
    """Grouped-query attention, gated MLP, no biases, untied embedding."""

    def tensors() -> Iterator[ParamShape]:
        yield ParamShape("embed_tokens.weight", (vocabulary, width))
        for block in range(depth):
            prefix = f"layers.{block}"
            for linear, out, into in (
                ("self_attn.q_proj", width, width),
                ("self_attn.k_proj", keys, width),
                ("self_attn.v_proj", keys, width),
                ("self_attn.o_proj", width, width),
                ("mlp.gate_proj", inner, width),
                ("mlp.up_proj", inner, width),
                ("mlp.down_proj", width, inner),
            ):
                yield ParamShape(f"{prefix}.{linear}.weight", (out, into), block)
            yield ParamShape(f"{prefix}.input_layernorm.weight", (width,))
            yield ParamShape(f"{prefix}.post_attention_layernorm.weight", (width,))
        yield ParamShape("norm.weight", (width,))
        yield ParamShape("lm_head.weight", (vocabulary, width))

    return ModelShapes(name, title, tuple(tensors()))


def llama_1b() -> ModelShapes:
    """TinyLlama 1.1B (Zhang et al. 2024)."""
    return _llama("llama-1b", "Llama-style 1.1B", 2048, 5632, 256, 22, 32000)


def llama_70b() -> ModelShapes:
    """Llama 3 70B (Grattafiori et al. 2024)."""
    return _llama("llama-70b", "Llama 3 70B", 8192, 28672, 1024, 80, 128256)


MODELS: dict[str, Callable[[], ModelShapes]] = {
    "tiny": tiny,
    "resnet18": resnet18,
    "vit-s16": vit_s16,
    "gpt2-124m": gpt2_124m,
    "gpt2-350m": gpt2_350m,
    "llama-1b": llama_1b,
}
"""Models by name, from small to large."""

PLANNED_MODELS = {**MODELS, "llama-70b": llama_70b}
"""Models to plan for, also those that are too large to be benchmarked on one machine."""

TOY_MODELS = frozenset({"tiny"})
"""Models for smoke tests, too small for meaningful measurements."""


def model_shapes(name: str) -> ModelShapes:
    """Return the shapes of the model `name`.

    Raises:
        LabError: the name is unknown.
    """
    if name not in MODELS:
        raise LabError(f"no model {name!r} to benchmark; there are {', '.join(MODELS)}")
    return MODELS[name]()


def planned_shapes(name: str) -> ModelShapes:
    """Return the shapes of the model `name` for a plan.

    Raises:
        LabError: the name is unknown.
    """
    if name not in PLANNED_MODELS:
        raise LabError(f"no model {name!r} to plan for; there are {', '.join(PLANNED_MODELS)}")
    return PLANNED_MODELS[name]()
