"""Find a model's output layers: the linear maps onto its vocabulary, classes or targets.

The rules below are tried in this order. The results of the first three add up; the fourth is used only if
they find nothing.

1. The model declares them: ``get_output_embeddings()`` (Hugging Face), ``get_classifier()`` (timm).
2. The last linear map of a module whose name always means an output (``lm_head``, ``to_logits``, ...).
3. The same for a name that often means one (``head``, ``cls_preds``, ``fc``, ``out``, ...), if no hidden
   layer is registered after it and no other output layer takes as many inputs as it has outputs.
4. The last linear map in registration order, if the model has another layer.

A layer inside a repeated block (an element of a ``ModuleList``, or one of several sibling modules of one
class) is never an output. Rule 4 skips the layers inside torch's attention and transformer modules, and a
model with an embedding that is tied to a linear map. Rule 4 is a guess, and rule 3 may reject a real output:
ambiguities.py writes notes and warnings for both.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

__all__ = [
    "BY_POSITION",
    "CONVS",
    "LORA",
    "find_output_layers",
    "find_overlooked",
    "find_trailing",
    "is_conv1d",
    "is_linear",
    "is_map",
    "is_ternary",
]

_CERTAIN = re.compile(
    r"lm_head|embed_out|output_projection|classifier|to_logits|unembed(ding)?|logits", re.IGNORECASE
)
_LIKELY = re.compile(
    r"head_dist|fc(_out)?|out(put)?(_layer)?|decoder|score|cls|final(_layer)?|predictions?|proj_out|readout|"
    r"generator|(class|bbox)_embed|actor|critic",
    re.IGNORECASE,
)
# Likely names as well; these are outputs even if they seem to feed another output layer.
_HEAD = re.compile(r"((^|_)heads?\d*|_preds?)$", re.IGNORECASE)
# Layers that condition an output module and are not its output: DiT's final layer has one.
_CONDITION = re.compile(r"modulation|ada_?(ln|norm)", re.IGNORECASE)
# The names that LoRA libraries give to their factors.
LORA = re.compile(r"(^|\.)lora_((embedding_)?[ab]|down|up|magnitude_vector)(\.|$)", re.IGNORECASE)
BY_POSITION = "the last linear map; nothing follows it"
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def is_linear(module: nn.Module) -> bool:
    """Return whether the module is ``nn.Linear``, a subclass, or named so (``ColumnParallelLinear``)."""
    if isinstance(module, nn.Linear) or is_ternary(module):
        return True
    name = type(module).__name__
    weight = module._parameters.get("weight")
    return (name.endswith("Linear") or name == "Conv1D") and weight is not None and weight.dim() == 2


def is_conv1d(module: nn.Module) -> bool:
    """Return whether the module is Hugging Face's Conv1D, a linear layer that stores [in, out]."""
    weight = module._parameters.get("weight")
    named = type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2
    return named and getattr(module, "nf", None) == weight.shape[-1]  # type: ignore[union-attr]


def is_ternary(module: nn.Module) -> bool:
    """Return whether the module is a ``TernaryLinear``, whose import would be circular."""
    return hasattr(type(module), "_steepest_targets")


def is_map(module: nn.Module) -> bool:
    """Return whether the module can be an output layer: linear or a convolution."""
    return is_linear(module) or isinstance(module, CONVS)


def find_output_layers(model: nn.Module, *, tied: bool) -> dict[int, str]:
    """Map the ``id`` of every output layer to the reason why it is one.

    ``tied`` says whether an embedding is known to be an output; then none is guessed from its position.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> find_output_layers(model, tied=False) == {id(model[2]): BY_POSITION}
    True
    """
    modules, maps = _maps(model)
    outputs: dict[int, str] = {}
    for path, method, layer in _declared(modules):
        outputs.setdefault(id(layer), f"{method}() of {path or type(model).__name__} returns it")
    named = _named(modules, maps)
    trailing = _trailing(modules, maps, named)
    for path, roots in named.items():
        parts = [root.rpartition(".")[2] for root in roots]
        found = [part for part in parts if path in trailing or _CERTAIN.fullmatch(part)]
        if found:
            reason = f"the last linear map of {found[0]!r}, outside repeated blocks"
            outputs.setdefault(id(modules[path]), reason)
    layers = (nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase)
    several = sum(is_map(module) or isinstance(module, layers) for module in modules.values()) > 1
    if not outputs and not tied and maps and several and _nothing_after(modules, maps[-1]):
        outputs[id(modules[maps[-1]])] = BY_POSITION
    return outputs


def find_overlooked(model: nn.Module, outputs: Collection[int]) -> set[int]:
    """Find layers that are named like outputs but are not among ``outputs``, all by their ids.

    If an output module is not a ``Sequential`` and the layer taken from it has no output's name itself, the
    module's other layers count too: the order of registration need not be the order of use.
    """
    modules, maps = _maps(model)
    found: set[int] = set()
    fed = {_widths(modules[path])[0] for path in maps if id(modules[path]) in outputs}
    for path, (root, *_) in _named(modules, maps, siblings=True).items():
        module, part = modules[path], root.rpartition(".")[2]
        if id(module) in outputs:
            below = path.removeprefix(root).split(".")
            if not (isinstance(modules[root], _CONTAINERS) or any(map(_is_output_name, below))):
                inner = [other for other in maps if other.startswith(f"{root}.")]
                inner = [other for other in inner if not _CONDITION.search(other)]
                found |= {id(modules[other]) for other in inner if not _in_block(modules, other, root)}
        elif _HEAD.search(part) or _CERTAIN.fullmatch(part) or _widths(module)[1] not in fed:
            found.add(id(module))
    return found.difference(outputs)


def find_trailing(model: nn.Module) -> set[int]:
    """Find the last linear map, and its counterparts if its module has siblings of the same class, by id."""
    modules, maps = _maps(model)
    if not maps:
        return set()
    parts = maps[-1].split(".")
    for end in range(1, len(parts)):
        parent, child = modules[".".join(parts[: end - 1])], modules[".".join(parts[:end])]
        if isinstance(parent, (nn.Sequential, nn.ModuleList)):
            continue
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            continue
        alike = [each for each in parent.children() if type(each) is type(child)]
        if len(alike) > 1:
            inner = [[m for m in each.modules() if is_map(m)] for each in alike]
            return {id(layers[-1]) for layers in inner if layers}
    return {id(modules[maps[-1]])}


def _maps(model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
    """Return all modules by path, and the paths of those that can be output layers."""
    modules = dict(model.named_modules())
    return modules, [path for path, module in modules.items() if is_map(module) and not LORA.search(path)]


def _is_output_name(name: str) -> bool:
    return bool(_CERTAIN.fullmatch(name) or _LIKELY.fullmatch(name) or _HEAD.search(name))


def _declared(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (path, method, layer) for every output layer that a module of the model declares."""
    for path, module in modules.items():
        for method in ("get_output_embeddings", "get_classifier"):
            try:
                declared: Any = getattr(module, method)()
            except (NotImplementedError, AttributeError, TypeError):
                continue
            for each in declared if isinstance(declared, (tuple, list)) else (declared,):
                inner = [m for m in each.modules() if is_map(m)] if isinstance(each, nn.Module) else []
                if inner:
                    yield path, method, inner[-1]


def _named(
    modules: Mapping[str, nn.Module], maps: list[str], *, siblings: bool = False
) -> dict[str, list[str]]:
    """Map linear maps to the modules with an output's name in which they are last, by path, outer ones first.

    With ``siblings``, maps inside one of several sibling modules of one class are included if these are
    attributes of their parent rather than elements of a container.
    """
    found: dict[str, list[str]] = {}
    for root, module in modules.items():
        if not _is_output_name(root.rpartition(".")[2]) or _in_block(modules, root, siblings=siblings):
            continue
        several = isinstance(module, (nn.ModuleDict, nn.ModuleList))
        for each in [f"{root}.{name}" for name, _ in module.named_children()] if several else [root]:
            inner = [path for path in maps if path == each or path.startswith(f"{each}.")]
            inner = [path for path in inner if not _CONDITION.search(path)] or inner
            if inner and not _in_block(modules, inner[-1], each):
                found.setdefault(inner[-1], []).append(root)
    return found


def _trailing(modules: Mapping[str, nn.Module], maps: list[str], named: Mapping[str, list[str]]) -> set[str]:
    """Return the named maps that are followed by output modules only and that feed none of those."""
    kept: set[str] = set()
    for path in reversed(maps):
        if path in named:
            width = _widths(modules[path])[1]
            if not any(_widths(modules[other])[0] == width for other in kept):
                kept.add(path)
                continue
        inside = any(path.startswith(f"{named[other][0]}.") for other in kept)
        if not inside and not _CONDITION.search(path):
            break
    return kept


def _widths(module: nn.Module) -> tuple[int, int]:
    """Return (number of inputs, number of outputs) of a linear map."""
    if isinstance(module, nn.Linear) or is_ternary(module):
        return module.in_features, module.out_features  # type: ignore[return-value]
    if isinstance(module, CONVS):
        return module.in_channels, module.out_channels
    rows, columns = module._parameters["weight"].shape  # type: ignore[union-attr]
    return (rows, columns) if type(module).__name__ == "Conv1D" else (columns, rows)


def _nothing_after(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Return whether the map is outside repeated blocks and no recurrent layer is registered after it."""
    after = list(modules)[list(modules).index(path) + 1 :]
    recurrent = any(isinstance(modules[each], (nn.RNNBase, nn.RNNCellBase)) for each in after)
    attention = isinstance(modules[path.rpartition(".")[0]], _LAYERS)
    return not (recurrent or attention or _in_block(modules, path))


def _in_block(modules: Mapping[str, nn.Module], path: str, root: str = "", *, siblings: bool = False) -> bool:
    """Return whether the layer is inside a repeated block below ``root``.

    Repeated means an element of a ``ModuleList`` or one of several siblings of one class; with ``siblings``,
    only siblings inside a container count.
    """
    inner = path.rpartition(".")[0]
    while len(inner) > len(root):
        outer = inner.rpartition(".")[0]
        parent, block = modules[outer], modules[inner]
        if isinstance(parent, nn.ModuleList):
            return True
        if isinstance(parent, _CONTAINERS) or not siblings:
            alike = sum(type(each) is type(block) for each in parent.children())
            if alike > 1 and not isinstance(block, _CONTAINERS):
                return True
        inner = outer
    return False
