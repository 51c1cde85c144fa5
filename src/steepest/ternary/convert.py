"""Replace a model's linear layers by ternary or binary ones, and back."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from steepest.distributed.local import is_dtensor
from steepest.hyperparameters import near_miss
from steepest.routing import Role, Routed, find_roles, find_tensors
from steepest.routing.output_layers import is_conv1d
from steepest.ternary.chunks import all_finite
from steepest.ternary.layer import BinaryLinear, Scale, TernaryLinear
from steepest.ternary.packing import Bits

__all__ = ["Ternarized", "densify", "ternarize"]


# Subclasses of nn.Linear that compute the same, to the rounding: Hugging Face's Falcon adds the bias apart.
_SAME_AS_LINEAR = frozenset({"FalconLinear"})


@dataclass(frozen=True)
class Ternarized:
    """What :func:`ternarize` did.

    Attributes:
        replaced: names of the layers that were replaced, with their shapes [out, in].
        kept: names of the linear layers that stay float, with the reason.
        bits: of a weight of the new layers, 2 (ternary) or 1 (binary).
        others: names of the other parameters that are matrices of hidden layers, with their shapes and what
            they are: experts, convolutions, recurrent layers. There are no ternary layers for them.

    >>> made = ternarize(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)))
    >>> dict(made.replaced), list(made.kept), made.weights
    ({'0': (4, 8)}, ['2'], 32)
    """

    replaced: Mapping[str, tuple[int, int]]
    kept: Mapping[str, str]
    bits: Bits = 2
    others: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Number of weights in the new layers."""
        return sum(rows * columns for rows, columns in self.replaced.values())

    def __str__(self) -> str:
        kind = "binary" if self.bits == 1 else "ternary"
        width = max(map(len, (*self.replaced, *self.kept, *self.others)), default=0)
        lines = [f"{name:{width}}  {r}×{c}, {kind}" for name, (r, c) in self.replaced.items()]
        lines += [f"{name:{width}}  kept: {why}" for name, why in self.kept.items()]
        for name, (shape, why) in self.others.items():
            lines.append(f"{name:{width}}  {'×'.join(map(str, shape))}, stays float: {why}")
        left = sum(math.prod(shape) for shape, _ in self.others.values())
        stay = f"; {left:,} of hidden layers that are not linear stay float" if left else ""
        return "\n".join([*lines, f"{self.weights:,} weights are {kind}{stay}"])


def ternarize(
    model: nn.Module,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    scale: Scale = "row",
    group_size: int = 128,
    bits: Bits = 2,
) -> Ternarized:
    """Replace a model's linear layers by ternary or binary ones, in place; the weights are rounded.

    Replaced are the ``nn.Linear`` of hidden layers, and Hugging Face's ``Conv1D``, which is one whose weight
    is stored as [in, out]. What :func:`steepest.build` considers an output layer
    stays float, and so do LoRA's factors and layers with a single row or column, unless ``include`` names
    them. Some layers cannot be replaced: those whose weight is shared with another module (a tied output
    layer), subclasses of ``nn.Linear`` (but Falcon's, which computes the same), layers with hooks, and those
    whose weight is read without calling their ``forward`` (in ``nn.MultiheadAttention``,
    ``nn.TransformerEncoderLayer``, and where the ``forward`` around them names it, as T5's
    ``self.wo.weight``).

    Make the optimizer afterwards: scales and biases are new parameters. Before ``save_pretrained`` of a
    Hugging Face model, call ``steepest.integrations.transformers.record_ternary(model)``: without its record
    in ``config.json``, ``from_pretrained`` makes dense layers with random weights.

    Args:
        model: any model that is not itself a linear layer.
        include: globs of module names; nothing else is replaced. None: all hidden layers.
        exclude: globs of module names that stay float.
        scale, group_size: of the layers, see :class:`TernaryLinear`.
        bits: 2 for :class:`TernaryLinear`, weights −1, 0 and 1; 1 for :class:`BinaryLinear`, −1 and 1.

    Returns:
        The names of the layers replaced and kept; as a string, a table.

    Raises:
        ValueError: a glob that matches no linear layer; ``include`` names one that cannot be replaced;
            nothing is left to replace; a weight to be rounded is not finite; other ``bits``. The model is
            as it was.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> print(ternarize(model))
    0  32×64, ternary
    2  kept: output: the last linear map; nothing follows it
    2,048 weights are ternary
    """
    if bits not in (1, 2):
        raise ValueError(f"ternarize(): bits must be 1 (binary) or 2 (ternary), got {bits!r}")
    kind = BinaryLinear if bits == 1 else TernaryLinear
    if isinstance(model, nn.Linear):
        raise ValueError(f"ternarize() replaces layers within a model; use {kind.__name__}.from_linear")
    wanted, unwanted = None if include is None else _globs(include), _globs(exclude)
    linears = {name: module for name, module in model.named_modules() if _is_linear(module)}
    for what, globs in (("include", wanted or ()), ("exclude", unwanted)):
        for glob in globs:
            if not any(_matches(name, (glob,)) for name in linears):
                near = near_miss(glob, linears)
                raise ValueError(f"{what}: {glob!r} matches no linear layer of the model{near}")
    tensors = find_tensors(model)
    roles = find_roles(model, tensors)
    refused, soft = _obstacles(model, linears, tensors, roles)
    others = {
        tensor.name: (tuple(tensor.param.shape), role.why)
        for tensor, role in zip(tensors, roles, strict=True)
        if role.hidden and not any(_is_linear(owner.module) for owner in tensor.owners)
    }
    replaced, kept = [], {}
    for name in linears:
        if _matches(name, unwanted):
            kept[name] = "excluded"
        elif wanted is not None and not _matches(name, wanted):
            kept[name] = "not included"
        elif name in refused:
            if wanted is not None:
                raise ValueError(f"layer {name!r} cannot be replaced: {refused[name]}; nothing was changed")
            kept[name] = refused[name]
        elif name in soft and wanted is None:
            kept[name] = soft[name]
        else:
            replaced.append(name)
    if not replaced:
        why = "".join(f"; {name}: {reason}" for name, reason in list(kept.items())[:3])
        raise ValueError(f"{type(model).__name__} has no linear layer to replace{why}")
    for name in replaced:
        if not all_finite(linears[name].weight):
            raise ValueError(f"the weight of {name!r} has infinite or NaN elements; nothing was changed")
    made = {name: kind.from_linear(_as_linear(linears[name]), scale, group_size) for name in replaced}
    _replace(model, {linears[name]: made[name] for name in replaced})
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in made.items()}
    return Ternarized(shapes, kept, bits, others)


def densify(model: nn.Module) -> list[str]:
    """Replace a model's ternary and binary layers by float ones with the same outputs; return their names.

    Make the optimizer afterwards: the weights are new parameters.

    Raises:
        ValueError: the model is itself such a layer.

    >>> model = nn.Sequential(TernaryLinear(8, 4), nn.ReLU())
    >>> densify(model), model[0]
    (['0'], Linear(in_features=8, out_features=4, bias=True))
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, TernaryLinear)}
    if "" in layers:
        raise ValueError("densify() replaces layers within a model; use the layer's to_linear()")
    _replace(model, {layer: layer.to_linear() for layer in layers.values()})
    return list(layers)


def _globs(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(name == glob or fnmatchcase(name, glob) for glob in globs)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _as_linear(module: nn.Module) -> nn.Linear:
    """Return a linear layer, or one that shares Conv1D's weight and bias."""
    if isinstance(module, nn.Linear):
        return module
    weight: Any = module.weight
    inputs, outputs = weight.shape
    made = nn.Linear(inputs, outputs, bias=module.bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().T, requires_grad=weight.requires_grad)
    made.bias = module.bias  # type: ignore[assignment]
    return made.train(module.training)


def _obstacles(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    tensors: Sequence[Routed],
    found: Sequence[Role],
) -> tuple[dict[str, str], dict[str, str]]:
    """Return, by name: (why a layer cannot be replaced, why it is not replaced unless it is named)."""
    modules = dict(model.named_modules())
    roles = {id(t.param): (role, t) for t, role in zip(tensors, found, strict=True)}
    refused: dict[str, str] = {}
    soft: dict[str, str] = {}
    for name, linear in linears.items():
        parts = name.split(".")
        around = [modules[".".join(parts[:end])] for end in range(len(parts))]
        readers = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
        reader = next((type(m).__name__ for m in around if isinstance(m, readers)), None)
        if around and f"self.{parts[-1]}.weight" in _forward_source(type(around[-1])):
            reader = type(around[-1]).__name__
        role, tensor = roles.get(id(linear._parameters.get("weight")), (None, None))
        if not (type(linear) is nn.Linear or is_conv1d(linear) or type(linear).__name__ in _SAME_AS_LINEAR):
            refused[name] = f"{type(linear).__name__} is an unknown subclass of nn.Linear"
        elif reader is not None:
            refused[name] = f"{reader} reads its weight without calling its forward"
        elif is_dtensor(linear._parameters.get("weight")):
            refused[name] = (
                "its weight is sharded: call ternarize() before fully_shard and parallelize_module"
            )
        elif role is None or tensor is None:
            refused[name] = "its weight is computed from other parameters"
        elif len({id(owner.module) for owner in tensor.owners}) > 1:
            others = [other for other in tensor.names if other != f"{name}.weight"]
            refused[name] = f"its weight is tied to {', '.join(others)}"
        elif _has_hooks(linear) or any(map(_has_hooks, linear.parameters())):
            refused[name] = "it, or a parameter of it, has hooks, which would be lost"
        elif not role.hidden:
            soft[name] = role.why
    return refused, soft


def _forward_source(kind: type[nn.Module]) -> str:
    """Return the source of a class's ``forward``; nothing if Python has none."""
    try:
        return inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return ""


def _has_hooks(owner: nn.Module | nn.Parameter) -> bool:
    """Tell whether a module or parameter has hooks of any of torch's kinds."""
    kinds = [name for name in vars(owner) if name.endswith("_hooks")]
    kinds += ["_backward_hooks", "_post_accumulate_grad_hooks"]
    return any(getattr(owner, kind, None) for kind in kinds)


def _replace(model: nn.Module, by: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules wherever they occur."""
    for parent in list(model.modules()):
        for local, child in list(parent._modules.items()):
            if child is not None and child in by:
                parent._modules[local] = by[child]
