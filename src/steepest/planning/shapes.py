"""Make a model on the meta device from the names and shapes of its parameters alone."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["Shapes", "listed", "model_of"]

Shapes: TypeAlias = Mapping[str, Sequence[int]] | Iterable[tuple[str, Sequence[int]]]

_EMBEDDING = re.compile(
    r"(^|_)(wte|wpe|(?<!patch_)embed(ding)?s?|embs?|tokens?|pos(itions?)?|vocab|table|codebook|shared|"
    r"relative_attention_bias)\d*$",
    re.IGNORECASE,
)
_EXPERTS = re.compile(r"experts?", re.IGNORECASE)
_CONVS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def listed(model: nn.Module | Shapes) -> nn.Module | Shapes:
    """Return what can be read more than once: a list in place of an iterator."""
    return list(model) if isinstance(model, Iterator) else model


def model_of(shapes: Shapes, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return modules on the meta device that have these parameters, for :func:`steepest.build`'s rules.

    A module's ``weight`` says what it is: one dimension a norm, two a linear layer, or an embedding if the
    module's name ends in a word for one (``wte``, ``wpe``, ``embed_tokens``, ``position_embeddings``,
    ``shared``, ...), three to five a convolution (of one channel per filter: a depthwise one), but three
    under a name with ``expert`` are experts' matrices. Numbered modules form lists.

    Raises:
        TypeError: ``shapes`` are neither pairs nor a dict; a size that is no integer.
        ValueError: no parameters; a name that is empty, given twice, or within another parameter; a negative
            size.

    >>> model = model_of({"wte.weight": (16, 8), "h.0.fc.weight": (32, 8), "h.0.fc.bias": (32,)})
    >>> model.h[0].fc, model.wte
    (Linear(in_features=8, out_features=32, bias=True), Embedding(16, 8))
    """
    pairs = list(shapes.items() if isinstance(shapes, Mapping) else shapes)
    if not pairs:
        raise ValueError("shapes must have at least one parameter")
    tree: _Tree = {}
    for pair in pairs:
        try:
            name, shape = pair
        except (TypeError, ValueError):
            raise TypeError(f"shapes must be pairs of a name and a shape, got {pair!r}") from None
        if isinstance(shape, Tensor):
            raise TypeError(
                f"shapes must be pairs of a name and a shape: {name!r} has a tensor, give its shape"
            )
        try:
            sizes = tuple(map(operator.index, shape))
        except TypeError:
            raise TypeError(f"shapes must be pairs of a name and a shape of integers, got {pair!r}") from None
        if not isinstance(name, str):
            raise TypeError(f"shapes must be pairs of a name and a shape, got {pair!r}")
        *path, local = name.split(".")
        if not (local and all(path)) or min(sizes, default=0) < 0:
            raise ValueError(f"no parameter can have the name {name!r} and the shape {sizes}")
        at = tree
        for part in path:
            below = at.setdefault(part, {})
            if not isinstance(below, dict):
                raise ValueError(f"{name!r} is within another parameter")
            at = below
        if local in at:
            raise ValueError(f"the name {name!r} is given twice, or is a module's")
        at[local] = sizes
    return _module("", tree, dtype)


_Tree: TypeAlias = "dict[str, _Tree | tuple[int, ...]]"


def _module(path: str, tree: _Tree, dtype: torch.dtype) -> nn.Module:
    own = {name: each for name, each in tree.items() if isinstance(each, tuple)}
    below = {name: each for name, each in tree.items() if isinstance(each, dict)}
    module = _layer(path, own, listed=bool(below) and all(map(str.isdigit, below)))
    for name, shape in own.items():
        param = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        module.register_parameter(name, param)
    for name, each in below.items():
        module.add_module(name, _module(f"{path}.{name}" if path else name, each, dtype))
    return module


def _layer(path: str, own: Mapping[str, tuple[int, ...]], *, listed: bool) -> nn.Module:
    """Return a layer that has parameters of these shapes, which the caller replaces."""
    shape = own.get("weight")
    bias = "bias" in own
    if shape is None:
        return nn.ModuleList() if listed and not own else nn.Module()
    if len(shape) == 1:
        return nn.LayerNorm(shape, bias=bias, device="meta")
    if len(shape) == 2:
        if _EMBEDDING.search(path.rpartition(".")[2]):
            return nn.Embedding(*shape, device="meta")
        return nn.Linear(shape[1], shape[0], bias=bias, device="meta")
    if len(shape) in _CONVS and min(shape) > 0 and not (len(shape) == 3 and _EXPERTS.search(path)):
        groups = shape[0] if shape[1] == 1 else 1
        kind: Any = _CONVS[len(shape)]
        made: nn.Module = kind(
            shape[1] * groups, shape[0], shape[2:], groups=groups, bias=bias, device="meta"
        )
        return made
    return nn.Module()
