"""List a model's parameters, each once, with every module that owns it; refuse unsupported ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["Owner", "Routed", "find_tensors", "is_vector", "refuse_unsupported"]


@dataclass(frozen=True)
class Owner:
    """A module that uses a parameter.

    Attributes:
        name: the parameter's name under this module.
        path: the module's path in the model.
        module: the module that computes with the parameter. For a parametrized weight it is the layer, not
            the list of parametrizations; for an ``nn.ParameterList``, the module that has the list.
        local: the module's attribute that is the parameter, contains it, or is computed from it:
            ``"weight"`` for the direction of a weight norm.
        kind: ``"whole"``, ``"magnitude"`` (the lengths of a weight norm), or ``"factor"`` (anything else
            that a parametrization computes the attribute from).
    """

    name: str
    path: str
    module: nn.Module
    local: str
    kind: Literal["whole", "magnitude", "factor"] = "whole"


@dataclass(frozen=True)
class Routed:
    """A parameter and its owners, in registration order; the first owner gives it its name."""

    param: Tensor
    owners: tuple[Owner, ...]

    @property
    def name(self) -> str:
        """The parameter's name in ``model.named_parameters()``."""
        return self.owners[0].name

    @property
    def names(self) -> tuple[str, ...]:
        """All names: more than one if the tensor is tied or its module shared."""
        return tuple(owner.name for owner in self.owners)


def is_vector(param: Tensor) -> bool:
    """Return whether at most one dimension is larger than 1: a vector in any shape."""
    return sum(size > 1 for size in param.shape) <= 1


def find_tensors(model: nn.Module) -> list[Routed]:
    """List the parameters of ``model`` in the order of ``model.named_parameters()``, shared ones once.

    >>> model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    >>> model["head"].weight = model["embed"].weight
    >>> [tensor.names for tensor in find_tensors(model)]
    [('embed.weight', 'head.weight')]
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[Tensor, list[Owner]] = {}
    for path, module in modules.items():
        for local, param in module._parameters.items():
            if param is not None:
                found.setdefault(param, []).append(_owner(modules, path, module, local))
    return [Routed(param, tuple(owners)) for param, owners in found.items()]


def _owner(modules: Mapping[str, nn.Module], path: str, module: nn.Module, local: str) -> Owner:
    name = f"{path}.{local}" if path else local
    parts = path.split(".")
    if "parametrizations" in parts[:-1]:
        at = parts.index("parametrizations")
        layer, attribute = ".".join(parts[:at]), parts[at + 1]
        kind = _kind(module, local) if len(parts) == at + 2 else "factor"
        return Owner(name, layer, modules[layer], attribute, kind)
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)) and path:
        parent, _, attribute = path.rpartition(".")
        return Owner(name, parent, modules[parent], attribute)
    # The older functions of torch.nn.utils: weight_norm makes weight_g and weight_v, spectral_norm and prune
    # make weight_orig.
    stem, _, suffix = local.rpartition("_")
    siblings = module._parameters
    if suffix in ("g", "v") and f"{stem}_g" in siblings and f"{stem}_v" in siblings:
        return Owner(name, path, module, stem, "magnitude" if suffix == "g" else "whole")
    return Owner(name, path, module, stem if suffix == "orig" else local)


def _kind(parametrizations: nn.Module, local: str) -> Literal["whole", "magnitude", "factor"]:
    """Return the kind of a parametrization's original: only torch's own two are known to keep the matrix."""
    names = {type(each).__name__ for each in parametrizations.children()}
    if names == {"_WeightNorm"}:
        return "magnitude" if local == "original0" else "whole"
    return "whole" if names == {"_SpectralNorm"} else "factor"


def refuse_unsupported(tensors: list[Routed], *, materialized: bool = True) -> None:
    """Raise ``ValueError``, with the parameter's name and the reason, if routing would be a guess.

    ``materialized`` refuses the meta device, too. The optimizer itself refuses what its rules do not take:
    integers, sparse storage, most DTensors.
    """
    element = "steepest.create('lion', model.parameters())"
    for tensor in tensors:
        param = tensor.param
        if is_lazy(param):
            reason = "has no shape yet: run the model once, then build the optimizer"
        elif materialized and param.is_meta:
            reason = (
                "is on the meta device: materialize the model first. That makes new parameters, and the "
                "optimizer would keep the old ones"
            )
        elif hasattr(param, "ds_id") or hasattr(param, "ds_tensor"):
            reason = (
                "is partitioned by DeepSpeed ZeRO: this rank has a flat shard without the tensor's shape. "
                f"build() needs whole tensors; ZeRO 3 works with element rules only: {element}"
            )
        elif getattr(param, "_is_flat_param", False):
            reason = (
                "is a FlatParameter: FSDP1 has flattened a module's tensors into one vector, and matrices, "
                f"norms and embeddings cannot be told apart in it. An element rule can step it: {element}"
            )
        elif getattr(param, "_fsdp_flattened", False):
            reason = (
                "belongs to a module sharded by FSDP1, whose parameters are 1-D shards even with "
                f"use_orig_params=True. An element rule can step them: {element}"
            )
        else:
            continue
        raise ValueError(f"parameter {tensor.name!r} {reason}")
