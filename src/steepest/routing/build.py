"""build: one optimizer for a model, with a param group for each set of options."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steepest.combined import combined_class
from steepest.distributed.local import is_dtensor
from steepest.engine.param_check import inner_tensors
from steepest.explain import Reasons
from steepest.group_names import group_names
from steepest.optimizer import Optimizer
from steepest.routing.ambiguities import find_ambiguities
from steepest.routing.heads import find_heads
from steepest.routing.known_layouts import has_own_layout
from steepest.routing.layers import LayerDecay, layer_rates
from steepest.routing.model import refuse_parameters
from steepest.routing.options import Options, as_table, check_options, matching, tensor_options
from steepest.routing.output_layers import is_ternary
from steepest.routing.roles import Role, find_roles
from steepest.routing.tensors import find_tensors, refuse_unsupported
from steepest.rule import Targets, find_rule
from steepest.views import View, is_interleaved, is_transposed, rows, transposed

__all__ = ["Formed", "build", "form_groups", "route", "warn_of_no_matrix"]


def build(
    model: nn.Module,
    rule: str = "muon",
    *,
    lr: float | Tensor | None = None,
    fallback: str | Mapping[str, Any] = "adamw",
    fallback_lr: float | Tensor | None = None,
    overrides: Mapping[str, str | Mapping[str, Any]] | None = None,
    views: Mapping[str, View | None] | None = None,
    decay_vectors: bool = False,
    layer_decay: LayerDecay | None = None,
    ternary: Mapping[str, Any] | bool | None = None,
    memory: Literal["least", "counts", "momentum"] | None = None,
    **hyper: Any,
) -> Optimizer:
    """Make one optimizer for all parameters of a model, with the right rule for each of them.

    A rule for the matrices of hidden layers (Muon and its variants) gets only those: linear and convolutional
    layers, attention, recurrent layers, experts. All other tensors go to ``fallback``: embeddings, output
    layers (tied or not), norms, biases, gains, tables of positions and tokens, LoRA factors, depthwise
    filters, and the direct parameters of unknown modules. A rule for all tensors (element rules, SGD-SaI,
    PSGD) gets everything. The module that owns a tensor decides, not its number of dimensions.
    ``print(optimizer.explain())`` shows each tensor's rule and the reason. The optimizer's class is named
    after its rules, as ``Muon+AdamW``, and each group's ``"name"`` says what it is, for monitors.

    Matrices that are known to be fused are stepped separately: query, key and value of
    ``nn.MultiheadAttention``, the gates of torch's recurrent layers, the groups of a convolution, and the
    fused projections of Hugging Face's and timm's modules, also where they are interleaved (query, key and
    value head by head in GPT-NeoX, BLOOM and Falcon; gate and up column by column in gpt-oss). Other
    matrices are taken whole; ``explain()`` names those that look fused, and ``views`` can cut them. Weights
    that are known to be stored as [in, out] are seen as [out, in]: torch's transposed convolutions, and
    Hugging Face's Conv1D and experts of gpt-oss, Llama 4 and others.

    Shared tensors are stepped once, under their first name. Frozen parameters are included, as in torch's
    own optimizers: without a gradient they are skipped and have no state, and once unfrozen they train.
    Frozen tensors that can never train (integers, packed formats) are left out.

    State: that of the groups' rules; ``explain()`` shows the bytes per rule.

    Args:
        model: a module with materialized parameters. Wrap or shard it first.
        rule: name of the main rule.
        lr: learning rate of the main rule; None means the rule's default.
        fallback: name of the rule for the other tensors, or a dict of group options including ``"rule"``.
        fallback_lr: learning rate of the fallback. None takes ``lr`` if both rules move parameters as far as
            AdamW does (AdamW itself, Muon and NorMuon with ``scale="match_rms_adamw"`` and
            ``extra_scale=1``, PSGD with ``lr_style="adam"``), and otherwise the fallback's own default.
            ``weight_decay`` and ``weight_decay_method`` carry over under the same condition.
        overrides: pattern of parameter names -> a rule's name, or a dict of group options with or without
            ``"rule"``. A pattern may leave out what wrappers add to names: ``module.``, ``_orig_mod.``,
            ``_fsdp_wrapped_module.``, ``_checkpoint_wrapped_module.``, and PEFT's ``base_model.model.``,
            ``.base_layer``, ``.original_module``, ``.modules_to_save.ADAPTER`` and the adapter's name after
            LoRA's parts, such as ``.lora_A``. If several patterns match, the later one wins, option by
            option. A rule that is neither the main rule nor the fallback has its own defaults for all other
            options.
        views: pattern of parameter names -> a view (:mod:`steepest.views`), which cuts a parameter into
            matrices or declares that it is stored as [in, out]. None takes it whole, as it is stored. Only
            rules that see matrices use views.
        decay_vectors: also decay norms, biases and gains. Tensors that the model lists in
            ``no_weight_decay()``, or marks with ``_no_weight_decay``, are decayed only if an override sets
            their weight decay.
        layer_decay: layer-wise learning rates, as for fine-tuning: that of layer i of n is lr·decayⁿ⁻ⁱ.
            Layers are counted by the model's lists of blocks (``nn.ModuleList``, ``nn.ModuleDict``,
            ``nn.Sequential``): embeddings and what comes before the blocks are layer 0, and output layers,
            with what follows the blocks, layer n. A model whose blocks are in no list is refused. Instead
            of the number, a dict from patterns of parameter names to factors on lr, or a function from names
            to factors. An override's own lr is taken as it is.
        ternary: options of :class:`steepest.ternary.TernaryFlip` for a model with ternary layers. The
            optimizer also moves their weights, in a group of its own. None does so without options if
            there are such layers, True requires that there are some, and False leaves them alone.
        memory: ``"least"`` stores averages in one byte, and what half-precision parameters drop in another
            (docs/memory.md): it is short for ``state_dtype="int8"`` and, if the model has bfloat16 or float16
            parameters, ``master="split8", rounding="stochastic"``. Options that are given take precedence.
            Simba's own option of this name, ``"counts"`` or ``"momentum"``, may be given here, too.
        **hyper: hyper-parameters of the main rule, and common options (:class:`~steepest.CommonOptions`),
            which apply to all groups except for ``weight_decay_method``.

    Raises:
        TypeError: ``model`` is not a module; ``ternary`` is not a dict, bool or None; a keyword or a group
            option that the rule does not know.
        ValueError: an unknown rule or ``memory``; a value out of range; nothing to train; a pattern that
            matches nothing; a fallback that does not take every tensor; parameters, by name, that are
            flattened or partitioned (FSDP1, DeepSpeed ZeRO), on the meta device or uninitialized; shards of
            Megatron's tensor parallelism, for a rule that needs whole tensors; options for ternary layers
            that the model does not have.

    >>> model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 16))
    >>> optimizer = build(model, "muon", lr=1e-3, weight_decay=0.1, fallback="adamw")
    >>> [(group["rule"], group["param_names"]) for group in optimizer.param_groups]
    [('muon', ['1.weight']), ('adamw', ['0.weight', '3.weight']), ('adamw', ['1.bias', '2.weight', ...])]
    >>> optimizer = build(model, "muon", lr=1e-3, overrides={"3.weight": "lion", "*.bias": {"lr": 0.01}})
    """
    optimizer = route(
        model,
        rule,
        lr=lr,
        fallback=fallback,
        fallback_lr=fallback_lr,
        overrides=overrides,
        views=views,
        decay_vectors=decay_vectors,
        layer_decay=layer_decay,
        ternary=ternary,
        memory=memory,
        **hyper,
    )
    warn_of_no_matrix(optimizer, stacklevel=3)
    return optimizer


def warn_of_no_matrix(optimizer: Optimizer, *, stacklevel: int) -> None:
    """Warn where the main rule has got no tensor."""
    for warning in optimizer.explain().warnings:
        if warning.startswith("nothing goes to"):
            warnings.warn(warning, UserWarning, stacklevel=stacklevel)


def route(model: nn.Module, rule: str = "muon", **options: Any) -> Optimizer:
    """Do what :func:`build` does, without a warning; for plans also on the meta device."""
    routed = form_groups(model, rule, **options)
    optimizer = combined_class(Optimizer, routed.groups)(routed.groups, **routed.main)
    routed.attach(optimizer)
    return optimizer


@dataclass(frozen=True)
class Formed:
    """A model's param groups, and what else its optimizer gets.

    Attributes:
        groups: the groups, with the options in which they differ from ``main``.
        main: the main rule and its options, with which the optimizer is made.
        targets: of ternary layers.
        reasons: for each tensor's rule.
    """

    groups: list[Options]
    main: Options
    targets: Targets | None
    reasons: Reasons

    def attach(self, optimizer: Optimizer) -> None:
        """Give an optimizer of these groups its targets and reasons."""
        if self.targets is not None:
            optimizer.watch(self.targets)
        optimizer.reasons = self.reasons


def form_groups(
    model: nn.Module,
    rule: str = "muon",
    *,
    views: Mapping[str, View | None] | None = None,
    decay_vectors: bool = False,
    layer_decay: LayerDecay | None = None,
    ternary: Mapping[str, Any] | bool | None = None,
    materialized: bool = True,
    **further: Any,
) -> Formed:
    """Form the param groups of :func:`build`, whose other arguments are in ``further``.

    ``materialized`` says whether parameters on the meta device are refused.
    """
    refuse_parameters(model)
    main, rest, override_options = check_options(
        rule, model.parameters(), layer_decay=layer_decay, ternary=ternary, **further
    )
    found = find_tensors(model)
    layers = {name: module for name, module in model.named_modules() if is_ternary(module)}
    # The votes stand for packed weights, which have a rule of their own.
    votes = {id(layer.votes) for layer in layers.values()}
    tensors = [tensor for tensor in found if id(tensor.param) not in votes]
    refuse_unsupported(tensors, materialized=materialized)
    override_table = as_table("overrides", override_options, tensors)
    view_table = as_table("views", views, tensors)
    if not any(tensor.param.requires_grad for tensor in found):
        raise ValueError(f"{type(model).__name__} has no parameter to train: none requires a gradient")
    roles = find_roles(model, tensors)
    rates = None
    if layer_decay is not None:
        if isinstance(layer_decay, Mapping):
            as_table("layer_decay", layer_decay, tensors)
        rates = layer_rates(model, tensors, roles, layer_decay, matching)
    scaled: dict[tuple[int, float], Tensor] = {}
    undecayed = _undecayed(model)
    formed: list[tuple[Options, Options]] = []
    why: dict[str, str] = {}
    left_out: list[str] = []
    known_views: set[str] = set()
    routed = []
    for tensor, role in zip(tensors, roles, strict=True):
        param, name = tensor.param, tensor.name
        patterns = matching(override_table, tensor)
        wanted = {option: value for each in patterns for option, value in override_table[each].items()}
        routed.append((tensor, role, "rule" in wanted))
        if not param.requires_grad and not _could_train(param):
            left_out.append(f"{name} ({str(param.dtype).removeprefix('torch.')})")
            continue
        options, why[name] = tensor_options(role, main, rest, patterns, wanted)
        known = find_rule(options["rule"]).hyper
        exempt = not undecayed.isdisjoint(tensor.names) or getattr(param, "_no_weight_decay", False)
        exempt = exempt or (role.vector and not decay_vectors)
        if exempt and "weight_decay" in known and "weight_decay" not in wanted:
            options["weight_decay"] = 0.0
        if role.kind == "experts" and "view" in known:
            options.setdefault("view", "batch")
        if "blocks" in known and "blocks" not in options and not matching(view_table, tensor):
            heads = find_heads(model, tensor, role)
            if heads is not None:
                options["blocks"] = heads
                why[name] += f", {heads[0][0]} query or key heads of {heads[0][1]} rows"
        if rates is not None and "lr" not in wanted:
            own = options.get("lr", find_rule(options["rule"]).own_defaults["lr"])
            options["lr"] = _scaled(own, rates.factors[name], scaled)
            if name in rates.layers:
                options["layer"] = rates.layers[name]
            why[name] += rates.why(name)
        # Tensor learning rates must be the same object.
        key = {each: id(value) if isinstance(value, Tensor) else value for each, value in options.items()}
        group = next((group for other, group in formed if other == key), None)
        if group is None:
            group = {**options, "params": []}
            formed.append((key, group))
        group["params"].append((name, param))
        if patterns := matching(view_table, tensor):
            if "views" in known:
                group.setdefault("views", {})[name] = view_table[patterns[-1]]
            else:
                why[name] += "; its view is not used"
        elif (view := _known_view(param, role, options)) is not None:
            if is_interleaved(view) and is_dtensor(param):
                why[name] += "; taken whole, since it is interleaved and sharded"
                view = transposed() if is_transposed(view) else None
            else:
                known_views.add(name)
            group.setdefault("views", {})[name] = view
    own_layouts = {
        tensor.name
        for tensor, role, _ in routed
        if role.kind == "linear" and has_own_layout(model, tensor.owners[0])
    }
    guesses: list[str] = []
    ambiguities: list[str] = []
    if find_rule(main["rule"]).hidden_only:
        guesses, ambiguities = find_ambiguities(model, routed, main["rule"], rest["rule"])
    order = [main["rule"], rest["rule"]]
    groups = [group for _, group in formed]
    groups.sort(key=lambda group: [*order, group["rule"]].index(group["rule"]))
    targets = None
    if ternary is False:
        left_out += [f"{name}.packed (ternary=False)" for name in layers]
    elif layers:
        make: Any = next(iter(layers.values()))._steepest_targets
        group, targets = make(model, ternary if isinstance(ternary, Mapping) else {})
        groups.append(group)
    elif ternary is not None:
        raise ValueError(
            f"ternary={ternary!r}, but {type(model).__name__} has no ternary layers; "
            "steepest.ternary.ternarize(model) makes some"
        )
    for each, group_name in zip(groups, group_names(groups, (main, rest)), strict=True):
        each.pop("layer", None)
        each["name"] = group_name
    reasons = Reasons(
        why=why,
        aliases={tensor.name: tensor.names[1:] for tensor in tensors if len(tensor.names) > 1},
        left_out=tuple(left_out),
        guesses=tuple(guesses),
        ambiguities=tuple(ambiguities),
        fallback=rest["rule"],
        known_views=frozenset(known_views),
        own_layouts=frozenset(own_layouts),
    )
    return Formed(groups, main, targets, reasons)


def _scaled(lr: float | Tensor, factor: float, made: dict[tuple[int, float], Tensor]) -> float | Tensor:
    """Return lr times a factor; a tensor is one for all groups of a factor, which schedulers fill."""
    if not isinstance(lr, Tensor):
        return lr * factor
    return lr if factor == 1 else made.setdefault((id(lr), factor), lr * factor)


def _undecayed(model: nn.Module) -> set[str]:
    """Return the names that the model or a submodule excludes by timm's ``no_weight_decay()``."""
    names: set[str] = set()
    for path, module in model.named_modules():
        declare: Any = getattr(module, "no_weight_decay", None)
        try:
            inspect.signature(declare).bind()
        except (TypeError, ValueError):  # no method, or one that takes arguments and means something else
            continue
        names |= {f"{path}.{name}" if path else name for name in declare()}
    return names


def _could_train(param: Tensor) -> bool:
    """Return whether a frozen parameter can be unfrozen: packed and integer ones cannot."""
    real = param.is_floating_point() or param.is_complex()
    if any(each.dtype != param.dtype for each in inner_tensors(param).values()):
        return False  # quantized: a tensor subclass that says it is float
    return real and param.dtype.itemsize >= 2 and param.layout is torch.strided


def _known_view(param: Tensor, role: Role, options: Options) -> View | None:
    """Return the view that a tensor is known to need under its rule and options, or None."""
    known = find_rule(options["rule"]).hyper
    if "views" not in known:
        return None
    if not isinstance(options.get("blocks", ""), str):
        # Blocks of rows cut it already.
        return transposed() if is_transposed(role.view) else None
    if role.kind == "experts" and "view" not in known:
        # The rule merges dimensions, and treats both sides of a matrix alike: each expert is a block.
        return rows(*[1] * param.shape[0])
    counts_matrices = options.get("view") == "batch"
    arranged = is_transposed(role.view) or role.kind == "experts"
    if arranged and param.dim() > 2 and counts_matrices != (role.kind == "experts"):
        # An option rearranges the dimensions, so that the ones to swap or to cut are unknown.
        return None
    return role.view
