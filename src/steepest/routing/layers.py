"""Layer-wise learning rates: find each parameter's layer from the model's lists of blocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from steepest.hyperparameters import rate
from steepest.routing.roles import Role
from steepest.routing.tensors import Routed

__all__ = ["LayerDecay", "LayerRates", "check_layer_decay", "layer_rates"]

LayerDecay: TypeAlias = "float | Mapping[str, float] | Callable[[str], float]"

_LISTS = (nn.ModuleList, nn.Sequential)
# Lists whose modules work side by side, or that are no part of the stack.
_PARALLEL = re.compile(r"expert|moe|head|branch|embed|token|adapter|lora|classifier|output", re.IGNORECASE)
# Names under which a stage holds its blocks.
_STACKED = re.compile(r"(res)?blocks?|layers|stages?|h", re.IGNORECASE)
# Outside of blocks, wherever it is registered.
_HEAD = re.compile(r"(^|[._])(heads?|classifier)\.")
_EMBEDDINGS = ("embedding", "table")


@dataclass(frozen=True)
class LayerRates:
    """The factors on the learning rates of a model's parameters.

    Attributes:
        factors: parameter name -> factor.
        layers: parameter name -> its layer, where a number gave the factors; else empty.
        depth: the number of the last layer.
    """

    factors: Mapping[str, float]
    layers: Mapping[str, int]
    depth: int

    def why(self, name: str) -> str:
        """Return the words that :meth:`~steepest.Optimizer.explain` adds to a tensor's reason."""
        if name in self.layers:
            return f"; layer {self.layers[name]} of {self.depth}"
        return f"; lr by layer_decay ({self.factors[name]:.3g})"


def layer_rates(
    model: nn.Module,
    tensors: Sequence[Routed],
    roles: Sequence[Role],
    decay: LayerDecay,
    match: Callable[[Mapping[str, Any], Routed], list[str]],
) -> LayerRates:
    """Return the factor on each parameter's learning rate.

    ``decay`` is a number, a function from names to factors, or a dict from patterns to factors, which
    ``match`` matches.

    Raises:
        TypeError: ``decay`` is none of these.
        ValueError: a factor out of range; a number for a model that has no list of blocks.
    """
    names = [tensor.name for tensor in tensors]
    if isinstance(decay, Mapping):
        given = {}
        for tensor in tensors:
            patterns = match(decay, tensor)
            given[tensor.name] = decay[patterns[-1]] if patterns else 1.0
    elif callable(decay):
        given = {name: decay(name) for name in names}
    else:
        check_layer_decay(decay)
        layers, depth = _find_layers(model, tensors, roles)
        return LayerRates({name: decay ** (depth - at) for name, at in layers.items()}, layers, depth)
    for name, factor in given.items():
        rate().check("build(), layer_decay", f"the factor of {name!r}", factor)
    return LayerRates(given, {}, 0)


def check_layer_decay(decay: Any) -> None:
    """Raise for a value that can be no ``layer_decay``, whatever the model."""
    if isinstance(decay, Mapping):
        for pattern, factor in decay.items():
            if not isinstance(pattern, str):
                raise TypeError(f"layer_decay: patterns of parameter names must be strings, got {pattern!r}")
            rate().check("build()", f"layer_decay[{pattern!r}]", factor)
    elif isinstance(decay, bool) or not (callable(decay) or isinstance(decay, (int, float))):
        raise TypeError(
            "layer_decay must be a number, a dict from patterns of parameter names to factors on lr, or a "
            f"function from names to factors, got {decay!r}"
        )
    elif not callable(decay):
        rate().check("build()", "layer_decay", decay)


def _find_layers(
    model: nn.Module, tensors: Sequence[Routed], roles: Sequence[Role]
) -> tuple[dict[str, int], int]:
    """Return each parameter's layer, and the last one.

    Embeddings and what comes before the blocks are layer 0, the blocks 1, 2, ..., and output layers and what
    follows the blocks the last. What stands between two blocks belongs to the one before.
    """
    blocks = [f"{path}." for path in _blocks(model)]
    if not blocks:
        raise ValueError(
            f"layer_decay: {type(model).__name__} has no nn.ModuleList or nn.Sequential of blocks by which "
            "layers could be counted. Give factors on lr instead: layer_decay={'encoder.*': 0.5, ...}, or a "
            "function from parameter names to factors"
        )
    pairs = list(zip(tensors, roles, strict=True))
    outputs = {id(tensor.owners[0].module) for tensor, role in pairs if role.kind == "output"}
    last, layers, reached = len(blocks) + 1, {}, 0
    for tensor, role in pairs:
        name = tensor.name
        own = next((at for at, path in enumerate(blocks, 1) if name.startswith(path)), None)
        if own is not None:
            layers[name] = reached = own
        elif role.kind in _EMBEDDINGS:
            layers[name] = 0
        elif id(tensor.owners[0].module) in outputs or reached == len(blocks) or _HEAD.search(name):
            layers[name] = last
        else:
            layers[name] = reached
    return layers, last


def _blocks(module: nn.Module, path: str = "", name: str = "") -> Iterator[str]:
    """Yield the paths of the blocks within a module, in order."""
    children = _with_parameters(module)
    if isinstance(module, _LISTS):
        if _PARALLEL.search(name):
            return
        if len(children) > 1 and _are_blocks(module, name, children):
            for local, child in children:
                yield from _stage(child, f"{path}{local}.") or [f"{path}{local}"]
            return
    for local, child in children:
        yield from _blocks(child, f"{path}{local}.", local)


def _stage(module: nn.Module, path: str) -> list[str]:
    """Return the paths of the blocks of a stage, as Swin and ConvNeXt have them; none of another block."""
    if isinstance(module, _LISTS):
        inside: list[tuple[str, nn.Module]] = [("", module)]
    else:
        inside = [(f"{name}.", each) for name, each in module.named_children() if _STACKED.fullmatch(name)]
    for prefix, each in inside:
        blocks = _with_parameters(each)
        alike = isinstance(each, _LISTS) and len({type(block) for _, block in blocks}) == 1
        if alike and all(_is_composite(block) for _, block in blocks):
            return [f"{path}{prefix}{local}" for local, _ in blocks]
    return []


def _are_blocks(module: nn.Module, name: str, children: Sequence[tuple[str, nn.Module]]) -> bool:
    """Return whether a list holds blocks; that of an MLP's linear layers does if its name says so."""
    named = isinstance(module, nn.ModuleList) and _STACKED.fullmatch(name) is not None
    return named or all(_is_composite(child) for _, child in children)


def _is_composite(module: nn.Module) -> bool:
    torchs_own = type(module).__module__.startswith("torch.nn.")
    return bool(_with_parameters(module)) or (
        not torchs_own and any(p.dim() > 1 for p in module.parameters())
    )


def _with_parameters(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]
