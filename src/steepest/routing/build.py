"""build: one optimizer for a model, with a param group for each set of options."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steepest.distributed.local import is_dtensor
from steepest.engine.param_check import inner_tensors
from steepest.explain import Reasons
from steepest.optimizer import Optimizer
from steepest.routing.ambiguities import find_ambiguities
from steepest.routing.heads import find_heads
from steepest.routing.options import (
    Options,
    as_options,
    as_table,
    fallback_options,
    least_memory,
    main_options,
    matching,
    tensor_options,
)
from steepest.routing.output_layers import is_ternary
from steepest.routing.roles import Role, find_roles
from steepest.routing.tensors import find_tensors, refuse_unsupported
from steepest.rule import find_rule
from steepest.views import View, is_interleaved, is_transposed, rows, transposed

__all__ = ["build", "route"]


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
    ``print(optimizer.explain())`` shows each tensor's rule and the reason.

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
        model: a module with materialized parameters; DTensors go to element and tensor rules.
        rule: name of the main rule.
        lr: learning rate of the main rule; None means the rule's default.
        fallback: name of the rule for the other tensors, or a dict of group options including ``"rule"``.
        fallback_lr: learning rate of the fallback. None takes ``lr`` if both rules move parameters as far as
            AdamW does (AdamW itself, Muon and NorMuon with ``scale="match_rms_adamw"`` and
            ``extra_scale=1``, PSGD with ``lr_style="adam"``), and otherwise the fallback's own default.
            ``weight_decay`` and ``weight_decay_method`` carry over under the same condition.
        overrides: pattern of parameter names -> a rule's name, or a dict of group options with or without
            ``"rule"``. If several patterns match, the later one wins, option by option. A rule that is
            neither the main rule nor the fallback has its own defaults for all other options.
        views: pattern of parameter names -> a view (:mod:`steepest.views`), which cuts a parameter into
            matrices or declares that it is stored as [in, out]. None takes it whole, as it is stored. Only
            rules that see matrices use views.
        decay_vectors: also decay norms, biases and gains. Tensors that the model lists in
            ``no_weight_decay()``, or marks with ``_no_weight_decay``, are decayed only if an override sets
            their weight decay.
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
            flattened or partitioned (FSDP1, DeepSpeed ZeRO), on the meta device or uninitialized, or DTensors
            for a rule that needs whole matrices; options for ternary layers that the model does not have.

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
        ternary=ternary,
        memory=memory,
        **hyper,
    )
    for warning in optimizer.explain().warnings:
        if warning.startswith("nothing goes to"):
            warnings.warn(warning, UserWarning, stacklevel=2)
    return optimizer


def route(
    model: nn.Module,
    rule: str = "muon",
    *,
    lr: float | Tensor | None = None,
    fallback: str | Mapping[str, Any] = "adamw",
    fallback_lr: float | Tensor | None = None,
    overrides: Mapping[str, str | Mapping[str, Any]] | None = None,
    views: Mapping[str, View | None] | None = None,
    decay_vectors: bool = False,
    ternary: Mapping[str, Any] | bool | None = None,
    memory: Literal["least", "counts", "momentum"] | None = None,
    materialized: bool = True,
    **hyper: Any,
) -> Optimizer:
    """Do what :func:`build` does, without a warning; for plans also on the meta device.

    ``materialized`` says whether parameters on the meta device are refused.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"build() takes a torch.nn.Module, got {type(model).__name__}")
    if not (ternary is None or isinstance(ternary, (bool, Mapping))):
        raise TypeError(f"ternary must be a dict of TernaryFlip's options, a bool or None, got {ternary!r}")
    if memory not in (None, "least") and "memory" in find_rule(rule).hyper:
        hyper["memory"] = memory
    elif memory is not None:
        hyper = {**least_memory(memory, model.parameters()), **hyper}
    main = main_options(rule, lr, hyper)
    rest = fallback_options(fallback, fallback_lr, main)
    found = find_tensors(model)
    layers = {name: module for name, module in model.named_modules() if is_ternary(module)}
    # The votes stand for packed weights, which have a rule of their own.
    votes = {id(layer.votes) for layer in layers.values()}
    tensors = [tensor for tensor in found if id(tensor.param) not in votes]
    refuse_unsupported(tensors, materialized=materialized)
    override_table = {
        pattern: as_options(f"overrides[{pattern!r}]", value)
        for pattern, value in as_table("overrides", overrides, tensors).items()
    }
    view_table = as_table("views", views, tensors)
    if not any(tensor.param.requires_grad for tensor in found):
        raise ValueError(f"{type(model).__name__} has no parameter to train: none requires a gradient")
    undecayed = _undecayed(model)
    formed: list[tuple[Options, Options]] = []
    why: dict[str, str] = {}
    left_out: list[str] = []
    known_views: set[str] = set()
    routed = []
    for tensor, role in zip(tensors, find_roles(model, tensors), strict=True):
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
    ambiguities: list[str] = []
    if find_rule(main["rule"]).hidden_only:
        ambiguities = find_ambiguities(model, routed, main["rule"], rest["rule"])
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
    optimizer = Optimizer(groups, **main)
    if targets is not None:
        optimizer.watch(targets)
    optimizer.reasons = Reasons(
        why=why,
        aliases={tensor.name: tensor.names[1:] for tensor in tensors if len(tensor.names) > 1},
        left_out=tuple(left_out),
        ambiguities=tuple(ambiguities),
        fallback=rest["rule"],
        known_views=frozenset(known_views),
    )
    return optimizer


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
