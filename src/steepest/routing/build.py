"""build: one optimizer for a model, with a param group for each set of options."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steepest.explain import Reasons
from steepest.optimizer import Optimizer
from steepest.registry import find_targets
from steepest.routing.ambiguities import find_ambiguities
from steepest.routing.options import Options, fallback_options, main_options, tensor_options
from steepest.routing.output_layers import is_ternary
from steepest.routing.patterns import as_options, as_table, matching, require_matches
from steepest.routing.roles import Role, find_roles
from steepest.routing.tensors import Routed, find_tensors
from steepest.routing.unsupported import refuse_unsupported
from steepest.rule import find_rule
from steepest.views import View, is_transposed, rows

__all__ = ["build"]


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
    **hyper: Any,
) -> Optimizer:
    """Make one optimizer for all parameters of a model, with the right rule for each of them.

    A rule for the matrices of hidden layers (Muon and its kin) gets only those: linear and convolutional
    layers, attention, recurrent layers, experts. All other tensors go to ``fallback``: embeddings, output
    layers (tied or not), norms, biases, gains, tables of positions and tokens, LoRA factors, depthwise
    filters, and the direct parameters of unknown modules. A rule for all tensors (element rules, SGD-SaI,
    PSGD) gets everything, and ``fallback`` is not used. The module that owns a tensor decides, not its
    number of dimensions. ``print(optimizer.explain())`` shows what each tensor got and why.

    Matrices that are known to be fused are stepped separately: query, key and value of
    ``nn.MultiheadAttention``, the gates of torch's recurrent layers, the groups of a convolution. The
    layout of other modules is not known, so their matrices are taken whole; ``explain()`` names those that
    look fused, and ``views`` says how to cut them. Weights that are known to be stored as [in, out] are
    seen transposed, since rules read [out, in]: torch's transposed convolutions, Hugging Face's Conv1D,
    and the experts of gpt-oss, Llama 4 and others there.

    Shared tensors are stepped once, under their first name. Frozen parameters are included, as in torch's
    own optimizers: they are skipped as long as they have no gradient, have no state, and train once they
    are unfrozen. Frozen tensors that can never train (integers, packed formats) are left out.

    State: that of the groups' rules; ``explain()`` shows the sums in bytes.

    Args:
        model: a module with materialized, unsharded parameters.
        rule: name of the main rule.
        lr: learning rate of the main rule; None is the rule's default.
        fallback: name of the rule for the other tensors, or a dict of group options including ``"rule"``.
        fallback_lr: learning rate of the fallback. None takes ``lr`` if both rules move parameters as far as
            AdamW does (AdamW itself, Muon and NorMuon with ``scale="match_rms_adamw"`` and
            ``extra_scale=1``, PSGD with ``lr_style="adam"``), and otherwise the fallback's own default.
            ``weight_decay`` and ``weight_decay_method`` carry over under the same condition.
        overrides: pattern of parameter names -> a rule's name, or a dict of group options with or without
            ``"rule"``. If several patterns match, the later one wins, option by option. A rule that is
            neither the main rule nor the fallback has its own defaults for all other options.
        views: pattern of parameter names -> a view: the matrices that a parameter consists of
            (:func:`steepest.views.rows` and kin), or that it is stored as [in, out]
            (:func:`steepest.views.transposed`). None takes the parameter whole, as it is stored. Only rules
            that see matrices use views.
        decay_vectors: also decay norms, biases and gains. Tensors that the model lists in
            ``no_weight_decay()``, or marks with ``_no_weight_decay``, are decayed only if an override sets
            their weight decay.
        ternary: options of :class:`steepest.ternary.TernaryFlip` for a model with ternary layers. The
            optimizer also moves their weights, in a group of its own. None does so without options if
            there are such layers, True requires that there are some, and False leaves them alone.
        **hyper: hyper-parameters of the main rule, and common options (:class:`~steepest.CommonOptions`),
            which apply to all groups except for ``weight_decay_method``.

    Raises:
        TypeError: ``model`` is not a module; ``ternary`` is not a dict, bool or None; a keyword or a group
            option that the rule does not know.
        ValueError: an unknown rule; a value out of range; nothing to train; a pattern that matches nothing;
            a fallback that does not take every tensor; parameters, by name, that are flattened or
            partitioned (FSDP1, DeepSpeed ZeRO), DTensors, on the meta device or uninitialized; options for
            ternary layers that the model does not have.

    >>> model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 16))
    >>> optimizer = build(model, "muon", lr=1e-3, weight_decay=0.1, fallback="adamw")
    >>> [(group["rule"], group["param_names"]) for group in optimizer.param_groups]
    [('muon', ['1.weight']), ('adamw', ['0.weight', '3.weight']), ('adamw', ['1.bias', '2.weight', ...])]
    >>> optimizer = build(model, "muon", lr=1e-3, overrides={"3.weight": "lion", "*.bias": {"lr": 0.01}})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"build() takes a torch.nn.Module, got {type(model).__name__}")
    if not (ternary is None or isinstance(ternary, (bool, Mapping))):
        raise TypeError(f"ternary must be a dict of TernaryFlip's options, a bool or None, got {ternary!r}")
    main = main_options(rule, lr, hyper)
    rest = fallback_options(fallback, fallback_lr, main)
    view_table = as_table("views", views)
    override_table = {
        pattern: as_options(f"overrides[{pattern!r}]", value)
        for pattern, value in as_table("overrides", overrides).items()
    }

    found = find_tensors(model)
    # What stands for packed weights has a rule of its own.
    tensors = [tensor for tensor in found if not _stands_in(tensor)]
    refuse_unsupported(model, tensors)
    require_matches("overrides", override_table, tensors)
    require_matches("views", view_table, tensors)
    if not any(tensor.param.requires_grad for tensor in found):
        raise ValueError(f"{type(model).__name__} has no parameter to train: none requires a gradient")
    undecayed = _undecayed(model)
    roles = find_roles(model, tensors)
    plan = _Plan()
    for tensor, role in zip(tensors, roles, strict=True):
        if not tensor.param.requires_grad and not _could_train(tensor.param):
            plan.left_out.append(f"{tensor.name} ({str(tensor.param.dtype).removeprefix('torch.')})")
            continue
        options, plan.why[tensor.name] = tensor_options(tensor, role, main, rest, override_table)
        exempt = _is_exempt(tensor, undecayed) or (role.vector and not decay_vectors)
        asked = any("weight_decay" in override_table[each] for each in matching(override_table, tensor))
        if exempt and not asked and "weight_decay" in find_rule(options["rule"]).hyper:
            options["weight_decay"] = 0.0
        plan.add(tensor, role, options, view_table)
    ambiguities: list[str] = []
    if find_rule(main["rule"]).hidden_only:
        settled = [any("rule" in override_table[p] for p in matching(override_table, t)) for t in tensors]
        ambiguities = find_ambiguities(model, tensors, roles, settled, main["rule"], rest["rule"])
    groups = plan.groups([main["rule"], rest["rule"]])
    make, others = find_targets(model)
    targets = None
    if make is None:
        if ternary is not None and ternary is not False:
            raise ValueError(
                f"ternary={ternary!r}, but {type(model).__name__} has no ternary layers; "
                "steepest.ternary.ternarize(model) makes some"
            )
    elif ternary is False:
        plan.left_out += [f"{name}.packed (ternary=False)" for name in others]
    else:
        group, targets = make(model, ternary if isinstance(ternary, Mapping) else {})
        groups.append(group)
    optimizer = Optimizer(groups, **main)
    if targets is not None:
        optimizer.watch(targets)
    optimizer.reasons = Reasons(
        why=plan.why,
        aliases={tensor.name: tensor.names[1:] for tensor in tensors if len(tensor.names) > 1},
        left_out=tuple(plan.left_out),
        ambiguities=tuple(ambiguities),
        fallback=rest["rule"],
        known_views=frozenset(plan.known_views),
    )
    for warning in optimizer.explain().warnings:
        if warning.startswith("nothing goes to"):
            warnings.warn(warning, UserWarning, stacklevel=2)
    return optimizer


@dataclass
class _Group:
    """Tensors that share all options, and the views of some of them."""

    options: Options
    params: list[tuple[str, Tensor]] = field(default_factory=list)
    views: dict[str, View | None] = field(default_factory=dict)

    def as_dict(self) -> Options:
        """The group as torch takes it."""
        return {**self.options, "params": self.params, **({"views": self.views} if self.views else {})}


@dataclass
class _Plan:
    """The groups as they are formed, and what ``explain()`` will say about the tensors."""

    formed: list[_Group] = field(default_factory=list)
    why: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    known_views: set[str] = field(default_factory=set)

    def add(self, tensor: Routed, role: Role, options: Options, views: Mapping[str, View | None]) -> None:
        """Put a tensor, with its view, into the group that has exactly its options; make one if needed."""
        known = find_rule(options["rule"]).hyper
        if role.batch and "view" in known:
            options.setdefault("view", "batch")
        group = next((group for group in self.formed if _same(group.options, options)), None)
        if group is None:
            group = _Group(options)
            self.formed.append(group)
        group.params.append((tensor.name, tensor.param))
        if patterns := matching(views, tensor):
            if "views" in known:
                group.views[tensor.name] = views[patterns[-1]]
            else:
                self.why[tensor.name] += "; its view is not used"
        elif (view := _known_view(tensor, role, options)) is not None:
            group.views[tensor.name] = view
            self.known_views.add(tensor.name)

    def groups(self, first: list[str]) -> list[Options]:
        """The param groups, those of the rules named ``first`` before the others."""
        made = [group.as_dict() for group in self.formed]
        return sorted(made, key=lambda group: [*first, group["rule"]].index(group["rule"]))


def _stands_in(tensor: Routed) -> bool:
    """Whether the parameter stands for a layer's packed weights."""
    owner = tensor.owners[0]
    return is_ternary(owner.module) and owner.local == "votes"


def _undecayed(model: nn.Module) -> set[str]:
    """Names that the model or a submodule excludes from weight decay, by timm's ``no_weight_decay()``."""
    names: set[str] = set()
    for path, module in model.named_modules():
        declare = getattr(module, "no_weight_decay", None)
        if callable(declare) and _takes_nothing(declare):
            names |= {f"{path}.{name}" if path else name for name in declare()}
    return names


def _takes_nothing(function: Callable[..., Any]) -> bool:
    """Whether the function can be called without arguments."""
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):
        return False
    return True


def _is_exempt(tensor: Routed, undecayed: set[str]) -> bool:
    """Whether the model excludes the tensor from weight decay, by a list of names or by a mark."""
    return not undecayed.isdisjoint(tensor.names) or getattr(tensor.param, "_no_weight_decay", False)


def _could_train(param: Tensor) -> bool:
    """Whether a frozen parameter can be unfrozen: packed and integer ones cannot."""
    real = param.is_floating_point() or param.is_complex()
    return real and param.dtype.itemsize >= 2 and param.layout is torch.strided


def _known_view(tensor: Routed, role: Role, options: Options) -> View | None:
    """The view that a tensor is known to need under its rule and options; None if it needs none."""
    known = find_rule(options["rule"]).hyper
    if "views" not in known:
        return None
    if role.batch and "view" not in known:
        # The rule merges dimensions, and treats both sides of a matrix alike: each expert is a block.
        return rows(*[1] * tensor.param.shape[0])
    counts_matrices = options.get("view") == "batch"
    if is_transposed(role.view) and tensor.param.dim() > 2 and counts_matrices != role.batch:
        # An option asks for another arrangement of the dimensions, in which it is unknown what to swap.
        return None
    return role.view


def _same(one: Options, other: Options) -> bool:
    """Whether two tensors can share a group; tensor learning rates must be the same object."""

    def equal(a: Any, b: Any) -> bool:
        return a is b or not (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b)

    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
