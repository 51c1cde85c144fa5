"""The tensors of real models, name by name, written down from their public architectures.

Nothing is downloaded and no module is built: a benchmark of optimizers needs names and shapes alone.
Linear layers are `nn.Linear`'s, [out, in], GPT-2's too, whose published checkpoints keep [in, out].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import LabError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """One parameter. `block` counts the repeated blocks from 0 if it is the matrix of a hidden layer."""

    name: str
    shape: Shape
    block: int | None = None

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ShapeList:
    """A model's parameters, tied ones once."""

    name: str
    title: str
    tensors: tuple[Tensor, ...]

    @property
    def numel(self) -> int:
        """How many parameters the model has.

        Example:
            >>> shape_list("gpt2-124m").numel
            124439808
        """
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def blocks(self) -> int:
        """How many repeated blocks there are."""
        return 1 + max((t.block for t in self.tensors if t.block is not None), default=-1)

    def hidden(self, blocks: int | None = None) -> tuple[Tensor, ...]:
        """The matrices of hidden layers, of the first `blocks` blocks only if that is given."""
        return tuple(t for t in self.tensors if t.block is not None and (blocks is None or t.block < blocks))


def _gpt2(name: str, title: str, width: int, depth: int, vocabulary: int, context: int) -> ShapeList:
    def tensors() -> Iterator[Tensor]:
        yield Tensor("wte.weight", (vocabulary, width))
        yield Tensor("wpe.weight", (context, width))
        for block in range(depth):
            at = f"h.{block}"
            for linear, out, into in (
                ("attn.c_attn", 3 * width, width),
                ("attn.c_proj", width, width),
                ("mlp.c_fc", 4 * width, width),
                ("mlp.c_proj", width, 4 * width),
            ):
                yield Tensor(f"{at}.{linear}.weight", (out, into), block)
                yield Tensor(f"{at}.{linear}.bias", (out,))
            for norm in ("ln_1", "ln_2"):
                yield Tensor(f"{at}.{norm}.weight", (width,))
                yield Tensor(f"{at}.{norm}.bias", (width,))
        yield Tensor("ln_f.weight", (width,))
        yield Tensor("ln_f.bias", (width,))

    return ShapeList(name, title, tuple(tensors()))


def tiny() -> ShapeList:
    """A GPT-2 of toy size, for smoke tests."""
    return _gpt2("tiny", "toy GPT-2", 32, 2, 128, 32)


def gpt2_124m() -> ShapeList:
    """GPT-2 small (Radford et al. 2019): 148 tensors, head tied to the embedding."""
    return _gpt2("gpt2-124m", "GPT-2 124M", 768, 12, 50257, 1024)


def gpt2_350m() -> ShapeList:
    """GPT-2 medium."""
    return _gpt2("gpt2-350m", "GPT-2 350M", 1024, 24, 50257, 1024)


def resnet18() -> ShapeList:
    """ResNet-18 for ImageNet (He et al. 2015), torchvision's names."""

    def norm(name: str, width: int) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", (width,))
        yield Tensor(f"{name}.bias", (width,))

    def tensors() -> Iterator[Tensor]:
        yield Tensor("conv1.weight", (64, 3, 7, 7))
        yield from norm("bn1", 64)
        width = 64
        for stage, out in enumerate((64, 128, 256, 512)):
            for half in range(2):
                at, block = f"layer{stage + 1}.{half}", 2 * stage + half
                yield Tensor(f"{at}.conv1.weight", (out, width, 3, 3), block)
                yield from norm(f"{at}.bn1", out)
                yield Tensor(f"{at}.conv2.weight", (out, out, 3, 3), block)
                yield from norm(f"{at}.bn2", out)
                if width != out:
                    yield Tensor(f"{at}.downsample.0.weight", (out, width, 1, 1), block)
                    yield from norm(f"{at}.downsample.1", out)
                width = out
        yield Tensor("fc.weight", (1000, 512))
        yield Tensor("fc.bias", (1000,))

    return ShapeList("resnet18", "ResNet-18", tuple(tensors()))


def vit_s16() -> ShapeList:
    """ViT-S/16 at 224 pixels with 1000 classes (Touvron et al. 2021), timm's names."""
    width = 384

    def tensors() -> Iterator[Tensor]:
        yield Tensor("cls_token", (1, 1, width))
        yield Tensor("pos_embed", (1, 1 + 14 * 14, width))
        yield Tensor("patch_embed.proj.weight", (width, 3, 16, 16))
        yield Tensor("patch_embed.proj.bias", (width,))
        for block in range(12):
            at = f"blocks.{block}"
            for norm in ("norm1", "norm2"):
                yield Tensor(f"{at}.{norm}.weight", (width,))
                yield Tensor(f"{at}.{norm}.bias", (width,))
            for linear, out, into in (
                ("attn.qkv", 3 * width, width),
                ("attn.proj", width, width),
                ("mlp.fc1", 4 * width, width),
                ("mlp.fc2", width, 4 * width),
            ):
                yield Tensor(f"{at}.{linear}.weight", (out, into), block)
                yield Tensor(f"{at}.{linear}.bias", (out,))
        yield Tensor("norm.weight", (width,))
        yield Tensor("norm.bias", (width,))
        yield Tensor("head.weight", (1000, width))
        yield Tensor("head.bias", (1000,))

    return ShapeList("vit-s16", "ViT-S/16", tuple(tensors()))


def llama_1b() -> ShapeList:
    """TinyLlama 1.1B (Zhang et al. 2024): grouped queries, a gated MLP, no biases, head not tied."""
    width, inner, keys, vocabulary = 2048, 5632, 256, 32000

    def tensors() -> Iterator[Tensor]:
        yield Tensor("embed_tokens.weight", (vocabulary, width))
        for block in range(22):
            at = f"layers.{block}"
            for linear, out, into in (
                ("self_attn.q_proj", width, width),
                ("self_attn.k_proj", keys, width),
                ("self_attn.v_proj", keys, width),
                ("self_attn.o_proj", width, width),
                ("mlp.gate_proj", inner, width),
                ("mlp.up_proj", inner, width),
                ("mlp.down_proj", width, inner),
            ):
                yield Tensor(f"{at}.{linear}.weight", (out, into), block)
            yield Tensor(f"{at}.input_layernorm.weight", (width,))
            yield Tensor(f"{at}.post_attention_layernorm.weight", (width,))
        yield Tensor("norm.weight", (width,))
        yield Tensor("lm_head.weight", (vocabulary, width))

    return ShapeList("llama-1b", "Llama-style 1.1B", tuple(tensors()))


SHAPE_LISTS: dict[str, Callable[[], ShapeList]] = {
    "tiny": tiny,
    "resnet18": resnet18,
    "vit-s16": vit_s16,
    "gpt2-124m": gpt2_124m,
    "gpt2-350m": gpt2_350m,
    "llama-1b": llama_1b,
}
"""By name, from small to large."""

TOYS = frozenset({"tiny"})
"""Those that show whether it runs at all, and measure nothing."""


def shape_list(name: str) -> ShapeList:
    """The shape list called `name`.

    Raises:
        LabError: there is none of that name.
    """
    if name not in SHAPE_LISTS:
        raise LabError(f"no model {name!r} to benchmark; there are {', '.join(SHAPE_LISTS)}")
    return SHAPE_LISTS[name]()
