"""Layer-wise learning rates: find each parameter's layer from the model's lists of blocks."""

from __future__ import annotations

import numbers
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from steepest.hyperparameters import rate
from steepest.routing.roles import Role
from steepest.routing.tensors import Routed

__all__ = ["LayerDecay", "LayerRates", "check_layer_decay", "layer_rates"]

LayerDecay: TypeAlias = "float | Mapping[str, float] | Callable[[str], float]"

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# Lists whose modules work side by side, or that are no part of the stack.
_PARALLEL = re.compile(r"expert|moe|head|branch|embed|token|adapter|lora|classifier|output", re.IGNORECASE)
# Names under which a stage holds its blocks.
_STACKED = re.compile(r"(res)?blocks?|layers|stages?|h", re.IGNORECASE)
_NUMBERED_STACK = re.compile(rf"({_STACKED.pattern}|layer)\d*", re.IGNORECASE)
# What a block has and a stack has not.
_ATTENTION = re.compile(r"(self_?|cross_?)?(attn|attention)", re.IGNORECASE)
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
        ValueError: a factor out of range; a number for a model in which no list of blocks is found.
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
        base = float(decay)
        return LayerRates({name: base ** (depth - at) for name, at in layers.items()}, layers, depth)
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
    elif isinstance(decay, bool) or not (callable(decay) or isinstance(decay, numbers.Real)):
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
            f"layer_decay: found no list of blocks in {type(model).__name__} by which to count layers: an "
            "nn.ModuleList, nn.ModuleDict or nn.Sequential whose modules have several layers each. Give "
            "factors on lr instead: layer_decay={'encoder.*': 0.5, ...}, or a function from parameter names "
            "to factors"
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


def _blocks(module: nn.Module, path: str = "", name: str = "", *, sure: bool = False) -> list[str]:
    """Return the paths of the blocks within a module, in order.

    ``sure`` is for a module that may itself be a block, whose lists hold its sublayers: it accepts a list
    only if that has the name of a stack and its modules are composite and of one class.
    """
    children = _with_parameters(module)
    if isinstance(module, _LISTS):
        listed = _listed(module, name, children)
        unsure = sure and not (_NUMBERED_STACK.fullmatch(name) and _are_alike(listed))
        if unsure or _PARALLEL.search(name):
            return []
        if listed:
            return [each for at, child in listed for each in _stage(child, f"{path}{at}.") or [f"{path}{at}"]]
    elif path and any(_ATTENTION.fullmatch(local) for local, _ in children):
        return []  # a block
    kinds = Counter(type(child) for _, child in children)
    in_sequence = isinstance(module, nn.Sequential)
    found = []
    for local, child in children:
        doubtful = not isinstance(child, _LISTS) and (in_sequence or kinds[type(child)] > 1)
        found += _blocks(child, f"{path}{local}.", local, sure=sure or doubtful)
    if found or not in_sequence or len(children) == 1:
        return found
    composite = [(f"{path}{local}", child) for local, child in children if _is_composite(child)]
    whole = not any(_blocks(child, f"{each}.") for each, child in composite)
    return [each for each, _ in composite] if whole else []


def _listed(
    module: nn.Module, name: str, children: list[tuple[str, nn.Module]]
) -> list[tuple[str, nn.Module]]:
    """Return those modules of a list that are blocks."""
    composite = [(local, child) for local, child in children if _is_composite(child)]
    kinds = Counter(type(child) for _, child in composite)
    repeated = [(local, child) for local, child in composite if kinds[type(child)] > 1]
    numbered = all(local.isdecimal() for local, _ in children) or _STACKED.fullmatch(name)
    if len(composite) == len(children) and (repeated or (numbered and not isinstance(module, nn.Sequential))):
        return children
    if isinstance(module, nn.ModuleList) and _STACKED.fullmatch(name):
        return children  # the linear layers of an MLP
    return repeated


def _stage(module: nn.Module, path: str) -> list[str]:
    """Return the paths of the blocks of a stage, as Swin and ConvNeXt have them; none of another block."""
    if isinstance(module, _LISTS):
        inside: list[tuple[str, nn.Module]] = [("", module)]
    else:
        inside = [(f"{name}.", each) for name, each in module.named_children() if _STACKED.fullmatch(name)]
    for prefix, each in inside:
        blocks = _with_parameters(each)
        if isinstance(each, _LISTS) and _are_alike(blocks):
            return [f"{path}{prefix}{local}" for local, _ in blocks]
    return []


def _are_alike(children: list[tuple[str, nn.Module]]) -> bool:
    """Return whether modules are composite and of one class."""
    return len({type(child) for _, child in children}) == 1 and all(
        _is_composite(each) for _, each in children
    )


def _is_composite(module: nn.Module) -> bool:
    torchs_own = type(module).__module__.startswith("torch.nn.")
    return bool(_with_parameters(module)) or (
        not torchs_own and any(p.dim() > 1 for p in module.parameters())
    )


def _with_parameters(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]
