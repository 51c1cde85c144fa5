"""Find the role of each parameter, from the module that owns it; only unknown modules are judged by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from steepest.explain import BY_NAME
from steepest.routing.known_layouts import find_fused
from steepest.routing.output_layers import (
    CONVS,
    LORA,
    find_output_layers,
    is_conv1d,
    is_linear,
    is_map,
    is_ternary,
)
from steepest.routing.tensors import Owner, Routed, is_vector
from steepest.views import View, is_transposed, rows, transposed

__all__ = ["Role", "find_roles"]

# Matrices of hidden layers: a rule that is for such matrices takes these kinds and no others.
_HIDDEN = frozenset({"linear", "conv", "attention", "recurrent", "experts"})
# Vectors and gains, which are not decayed by default, because zero is not their natural value.
_VECTORS = frozenset({"norm", "bias", "gain"})

_NORM = re.compile(r"norm(\d+d)?$", re.IGNORECASE)
# A capital letter starts a new word: ExpertsMLP holds experts, Expertise does not.
_EXPERTS = re.compile(r"(?i:experts?)($|[^a-z])|(?i:moe)")
_BIAS = re.compile(r"(^|_)b(ias(es)?)?(_|$)")
# For two dimensions or more, where `b` is more often the second of a pair of matrices.
_BIAS_TABLE = re.compile(r"(^|_)bias(es)?(_|$)")
# A word for positions counts anywhere in a name. The other words count only at the end, where they say what
# the parameter is: embed_proj is a projection. `query` counts only alone, since w_query computes queries.
_POSITIONS = re.compile(r"(^|_)(pos|positions?|positional)(_|$)")
_TABLE = re.compile(
    r"(^|_)(embeds?|embeddings?|emb|tokens?|table|queries|latents?|codebook|prototypes?|memory)(_?\d+)?$|"
    r"^query(_?\d+)?$"
)
_EXPERT_COUNTS = ("num_experts", "n_experts", "num_local_experts", "n_routed_experts", "num_routed_experts")
# Hugging Face's classes that store experts as [experts, in, out]. Newer releases also set `is_transposed` on
# the modules; that attribute takes precedence, because the layout of a class has changed between releases.
_TRANSPOSED_EXPERTS = re.compile(
    "AriaGroupedExpertsGemm|GptOssExperts|Llama4TextExperts|OpenAIPrivacyFilterExperts|Qwen3VLMoeTextExperts"
)
_TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_GATES = {nn.LSTM: 4, nn.GRU: 3, nn.LSTMCell: 4, nn.GRUCell: 3}


@dataclass(frozen=True)
class Role:
    """A parameter's role in its model.

    Attributes:
        kind: one word: ``"linear"``, ``"output"``, ``"embedding"``, ``"norm"``, ...
        reason: a phrase that gives the reason.
        view: the view of a parameter that is known to be several matrices or to be stored transposed; None
            for other parameters.
    """

    kind: str
    reason: str
    view: View | None = None

    @property
    def hidden(self) -> bool:
        """Whether the parameter is one or several matrices of a hidden layer."""
        return self.kind in _HIDDEN

    @property
    def vector(self) -> bool:
        """Whether the parameter is a norm's, a bias or a gain, which are not decayed by default."""
        return self.kind in _VECTORS

    @property
    def why(self) -> str:
        """Kind and reason, as ``explain()`` shows them."""
        return f"{self.kind}: {self.reason}"


def find_roles(model: nn.Module, tensors: list[Routed]) -> list[Role]:
    """Find the role of each of these tensors of ``model``.

    >>> from steepest.routing import find_tensors
    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 9))
    >>> [role.kind for role in find_roles(model, find_tensors(model))]
    ['embedding', 'linear', 'bias', 'norm', 'norm', 'output', 'bias']
    """
    tied = any(_embedding(t) is not None and any(is_linear(o.module) for o in t.owners) for t in tensors)
    outputs = find_output_layers(model, tied=tied)
    return [_fused(model, tensor, _role(tensor, outputs)) for tensor in tensors]


def _fused(model: nn.Module, tensor: Routed, role: Role) -> Role:
    """Add the view of a weight that is known to be several matrices, by the class that owns its layer."""
    if role.kind in ("linear", "experts") and (role.view is None or role.view[0] == "whole"):
        found = find_fused(model, tensor.owners[0], tensor.param, role.view)
        if found is not None:
            return replace(role, view=found[0], reason=f"{role.reason}, {found[1]}")
    return role


def _role(tensor: Routed, outputs: Mapping[int, str]) -> Role:
    param, owner = tensor.param, tensor.owners[0]
    layer = _called(owner.module)
    if param.is_complex():
        return Role("complex", "complex parameters are stepped element by element")
    if (embedding := _embedding(tensor)) is not None:
        tied = [o.name for o in tensor.owners if is_linear(o.module)]
        also = f", and the output layer {', '.join(tied)} (tied)" if tied else ""
        return Role("embedding", f"{_called(embedding.module)}, a row for each input{also}")
    if owner.kind == "magnitude":
        return Role("gain", f"the magnitudes of {layer}'s weight norm")
    if owner.kind == "factor":
        return Role("factor", f"a parametrization computes {layer}'s {owner.local} from it")
    if LORA.search(owner.name) and not is_vector(param):
        return Role("lora", "a factor of a low-rank product; the layer's matrix is the product")
    if isinstance(owner.module, nn.MultiheadAttention):
        return _attention(param, owner)
    if _is_norm(owner.module):
        return Role("norm", layer)
    if is_ternary(owner.module) and owner.local == "scale":
        return Role("gain", "the scales of TernaryLinear's weights")
    if param.dim() <= 1:
        return Role("bias", layer) if _BIAS.search(owner.local) else Role("gain", f"a vector of {layer}")
    for each in tensor.owners:
        if id(each.module) in outputs and each.local == "weight":
            return Role("output", outputs[id(each.module)], _stored(param, each.module))
    recurrent = isinstance(owner.module, (nn.RNNBase, nn.RNNCellBase))
    if is_vector(param) and (recurrent or (is_map(owner.module) and owner.local == "weight")):
        return Role("vector", f"{layer} with a single row or column")
    if is_linear(owner.module) and owner.local == "weight":
        view = _stored(param, owner.module)
        return Role("linear", f"{layer}, hidden" + (", stored [in, out]" if view else ""), view)
    if isinstance(owner.module, CONVS) and owner.local == "weight":
        return _convolution(param, owner.module)
    if recurrent:
        return _recurrent(param, owner)
    if isinstance(owner.module, nn.Bilinear):
        return Role("linear", f"{layer}, linear in the product of its inputs")
    return _loose(param, owner)


def _called(module: nn.Module) -> str:
    """Return the name of the module's class before any parametrization."""
    name = type_before_parametrizations(module).__name__
    return "Linear" if name == "NonDynamicallyQuantizableLinear" else name


def _embedding(tensor: Routed) -> Owner | None:
    """Return the first owner that looks up rows of the tensor, or None."""
    for owner in tensor.owners:
        kind = type(owner.module).__name__
        alike = kind.endswith("Embedding") and not is_map(owner.module)
        lookup = isinstance(owner.module, (nn.Embedding, nn.EmbeddingBag)) or alike
        if lookup and owner.local == "weight" and owner.kind == "whole":
            return owner
    return None


def _is_norm(module: nn.Module) -> bool:
    """Return whether the module is a norm: one of torch's, or one that is named so and is not a map."""
    torchs = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
    called = _NORM.search(type(module).__name__) is not None
    return isinstance(module, torchs) or (called and not is_map(module))


def _attention(param: Tensor, owner: Owner) -> Role:
    """Return the role of a parameter of ``nn.MultiheadAttention`` itself, not of its output projection."""
    if "bias" in owner.local:
        return Role("bias", "MultiheadAttention")
    if owner.local == "in_proj_weight":
        width = param.shape[0] // 3
        return Role("attention", "query, key and value of MultiheadAttention, fused", rows(*[width] * 3))
    return Role("attention", f"{owner.local[0]} of MultiheadAttention")


def _convolution(param: Tensor, module: nn.Module) -> Role:
    """Return the role of a convolution's weight: a matrix that maps patches, or one such matrix per group."""
    layer, groups = _called(module), int(module.groups)  # type: ignore[arg-type]
    if groups > 1 and groups in (module.in_channels, module.out_channels):
        return Role("depthwise", f"{layer}, separate filters for each channel, which form no matrix")
    view = _stored(param, module)
    what = "a matrix [out, rest]" if groups == 1 else f"a matrix for each of {groups} groups"
    stored = ", stored [in, out, ...]" if is_transposed(view) else ""
    return Role("conv", f"{layer}, {what}{stored}", view)


def _stored(param: Tensor, module: nn.Module) -> View | None:
    """Return how the weight of a linear layer or convolution is stored; None for one matrix [out, rest].

    Hugging Face's Conv1D is recognized without importing transformers.
    """
    if isinstance(module, CONVS):
        groups = int(module.groups)
        blocks = None if groups == 1 else rows(*[param.shape[0] // groups] * groups)
        return transposed(blocks) if isinstance(module, _TRANSPOSED_CONVS) else blocks
    return transposed() if is_conv1d(module) else None


def _recurrent(param: Tensor, owner: Owner) -> Role:
    """Return the role of a recurrent layer's matrix: all but the projection stack the gates' rows."""
    layer = _called(owner.module)
    gates = next((count for kind, count in _GATES.items() if isinstance(owner.module, kind)), 1)
    if gates == 1 or owner.local.startswith("weight_hr"):
        return Role("recurrent", layer)
    return Role("recurrent", f"{layer}, {gates} gates fused", rows(*[param.shape[0] // gates] * gates))


def _loose(param: Tensor, owner: Owner) -> Role:
    """Return the role of a parameter with two or more dimensions in a module that is not torch's."""
    layer, local = _called(owner.module), owner.local.lower()
    positions = _POSITIONS.search(local) is not None
    if positions or _TABLE.search(local):
        if is_vector(param):
            return Role("gain", f"a token of {layer}")
        if positions:
            return Role("table", f"{layer}'s positions, one row each")
        return Role("table", f"{layer}'s tokens, queries or the like, one row each, {BY_NAME}")
    if (_BIAS if is_vector(param) else _BIAS_TABLE).search(local):
        return Role("bias", layer)
    if is_vector(param):
        return Role("gain", f"a vector of {layer}")
    if getattr(param, "_no_weight_decay", False):
        return Role("gain", f"{layer}'s, marked _no_weight_decay")
    if param.dim() == 3 and _holds_experts(param, owner):
        reason = f"{param.shape[0]} experts' matrices of {layer}"
        if _experts_are_transposed(owner.module):
            return Role("experts", f"{reason}, stored [in, out]", transposed())
        return Role("experts", reason)
    return Role("unknown", f"{param.dim()} dimensions, owned by {layer}, an unknown module")


def _holds_experts(param: Tensor, owner: Owner) -> bool:
    """Return whether the first dimension counts experts, by the module's attributes or else by its name."""
    counts = [getattr(owner.module, name, None) for name in _EXPERT_COUNTS]
    if any(count is not None for count in counts):
        return param.shape[0] in counts
    return any(_EXPERTS.search(word) for word in (type(owner.module).__name__, owner.path, owner.local))


def _experts_are_transposed(module: nn.Module) -> bool:
    """Return whether experts are stored as [experts, in, out], by the module's attribute or its class."""
    says = getattr(module, "is_transposed", None)
    return says if isinstance(says, bool) else bool(_TRANSPOSED_EXPERTS.fullmatch(type(module).__name__))
