"""build: a model's parameters in param groups, each with the rule that is right for it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steepest.explain import Reasons
from steepest.hyperparameters import near_miss
from steepest.optimizer import Optimizer
from steepest.registry import find_maker, optimizer_class
from steepest.routing.ambiguities import find_doubts
from steepest.routing.patterns import as_options, as_table, matching, require_matches
from steepest.routing.roles import Role, find_roles
from steepest.routing.tensors import Routed, find_tensors
from steepest.routing.unsupported import refuse
from steepest.rule import find_rule
from steepest.rules.muon import Muon
from steepest.rules.orthogonalized import OrthogonalizedOptimizer
from steepest.views import View, is_transposed, rows

__all__ = ["build"]

Options = dict[str, Any]

# Where a group's options wait until all of its tensors are known.
_OPTIONS = "_options"


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
    """One optimizer for all parameters of a model, each with the rule that is right for it.

    A rule for the matrices of hidden layers (Muon and its kin) gets those and no others: linear and
    convolutional layers, attention, recurrent layers, experts. Everything else goes to ``fallback``:
    embeddings, the output head (tied or not), norms, biases, gains, tables of positions and tokens,
    LoRA's factors, depthwise filters, and what modules that are not known keep as parameters of their own.
    A rule that is for any tensor (element rules, SGD-SaI, PSGD) gets
    everything, and ``fallback`` is not used. The module that owns a tensor decides, not its number of
    dimensions. ``print(optimizer.explain())`` shows what every tensor got and why.

    Matrices that are known to be fused are stepped apart: query, key and value of
    ``nn.MultiheadAttention``, the gates of torch's recurrent layers, the groups of a convolution. Those
    of other modules are taken whole, since nobody but their author knows the layout; ``explain()``
    names those that look fused, and ``views`` tells. Weights that are known to be stored [in, out], where
    rules read [out, in], are seen transposed: torch's transposed convolutions, Hugging Face's Conv1D and
    the experts of its gpt-oss, Llama 4 and others that say so.

    Shared tensors are stepped once, under the first of their names. Frozen parameters are included, as in
    torch's own optimizers: they are skipped as long as they have no gradient, cost no state, and train
    once they are thawed. Frozen ones that could never train (integers, packed formats) are left out.

    State: what the rules of the groups keep; ``explain()`` has the sums in bytes.

    Args:
        model: a module with materialized, unsharded parameters.
        rule: name of the main rule.
        lr: its learning rate; None is the rule's default.
        fallback: name of the rule for the rest, or a dict of group options with ``"rule"`` in it.
        fallback_lr: learning rate of the rest. None: ``lr`` if both rules move parameters as far as
            AdamW does (AdamW itself, Muon and NorMuon with ``scale="match_rms_adamw"`` and
            ``extra_scale=1``, PSGD with ``lr_style="adam"``), otherwise the fallback's own default.
            ``weight_decay`` and
            ``weight_decay_method`` carry over under the same condition.
        overrides: glob of parameter names -> a rule's name, or a dict of group options (``"rule"`` among
            them, or not). Of several that match, the later wins, option by option. A rule that is
            neither the main one nor the fallback has its own defaults otherwise.
        views: glob of parameter names -> the matrices a parameter consists of
            (:func:`steepest.views.rows` and kin), or that it is stored [in, out]
            (:func:`steepest.views.transposed`); None takes it whole, as it is stored. Used by rules that
            see matrices.
        decay_vectors: decay norms, biases and gains too. What the model lists in ``no_weight_decay()``,
            or marks with ``_no_weight_decay``, is never decayed, unless an override says how much.
        ternary: options of :class:`steepest.ternary.TernaryFlip` for a model with ternary layers, whose
            weights are no parameters: the optimizer moves them too, also without options here (None, or
            True, which insists on there being some). False: it leaves them as they are.
        **hyper: the main rule's hyper-parameters; of the common options (:class:`~steepest.CommonOptions`),
            all groups' but for ``weight_decay_method``.

    Raises:
        TypeError: ``model`` is no module; ``ternary`` is no dict, bool or None; a keyword or a group option
            that the rule does not know.
        ValueError: an unknown rule; a value out of range; nothing to train; a glob that matches nothing;
            a fallback that does not take every tensor; parameters that are flattened or partitioned
            (FSDP1, DeepSpeed ZeRO), DTensors, on the meta device or uninitialized, by name; options for
            ternary layers that the model has not.

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
    main, rest = _main(rule, lr, hyper), _rest(fallback, fallback_lr)
    _carry_over(main, rest)
    find_rule(rest["rule"]).check("build(), fallback", {**find_rule(rest["rule"]).defaults(), **rest})
    asked, views = as_table("overrides", overrides), as_table("views", views)
    said = {glob: as_options(f"overrides[{glob!r}]", value) for glob, value in asked.items()}

    found = find_tensors(model)
    refuse(model, found)
    require_matches("overrides", said, found)
    require_matches("views", views, found)
    if not any(tensor.param.requires_grad for tensor in found):
        raise ValueError(f"{type(model).__name__} has no parameter to train: none requires a gradient")
    undecayed = _undecayed(model)
    groups: list[Options] = []
    why: dict[str, str] = {}
    left_out: list[str] = []
    known_views: set[str] = set()
    roles = find_roles(model, found)
    for tensor, role in zip(found, roles, strict=True):
        if not tensor.param.requires_grad and not _could_train(tensor.param):
            left_out.append(f"{tensor.name} ({str(tensor.param.dtype).removeprefix('torch.')})")
            continue
        options, why[tensor.name] = _options(tensor, role, main, rest, said)
        exempt = _is_exempt(tensor, undecayed) or (role.vector and not decay_vectors)
        kept = any("weight_decay" in said[glob] for glob in matching(said, tensor))
        if exempt and not kept and "weight_decay" in find_rule(options["rule"]).hyper:
            options["weight_decay"] = 0.0
        group = _group_for(groups, tensor, role, options)
        if globs := matching(views, tensor):
            if "views" in find_rule(options["rule"]).hyper:
                group.setdefault("views", {})[tensor.name] = views[globs[-1]]
            else:
                why[tensor.name] += "; its view is not used"
        elif (view := _known_view(tensor, role, options)) is not None:
            group.setdefault("views", {})[tensor.name] = view
            known_views.add(tensor.name)
    order = [main["rule"], rest["rule"]]
    groups = [{**group.pop(_OPTIONS), **group} for group in groups]
    groups.sort(key=lambda group: order.index(group["rule"]) if group["rule"] in order else 2)
    doubts: list[str] = []
    if find_rule(main["rule"]).hidden_only:
        settled = [any("rule" in said[glob] for glob in matching(said, tensor)) for tensor in found]
        doubts = find_doubts(model, found, roles, settled, main["rule"], rest["rule"])
    maker, others = find_maker(model)
    if maker is None:
        if ternary is not None and ternary is not False:
            raise ValueError(
                f"ternary={ternary!r}, but {type(model).__name__} has no ternary layers; "
                "steepest.ternary.ternarize(model) makes some"
            )
        optimizer = Optimizer(groups, **main)
    elif ternary is False:
        left_out += [f"{name}.packed (ternary=False)" for name in others]
        optimizer = Optimizer(groups, **main)
    else:
        votes = ternary if isinstance(ternary, Mapping) else {}
        optimizer = maker(model, groups, votes, **main)
    aliases = {tensor.name: tensor.names[1:] for tensor in found if len(tensor.names) > 1}
    optimizer.reasons = Reasons(why, aliases, tuple(left_out), tuple(doubts), rest["rule"], known_views)
    for warning in optimizer.explain().warnings:
        if warning.startswith("nothing goes to"):
            warnings.warn(warning, UserWarning, stacklevel=2)
    return optimizer


def _main(rule: str, lr: float | Tensor | None, hyper: Mapping[str, Any]) -> Options:
    """The main rule's options, checked; what they are is the optimizer's defaults."""
    found = find_rule(rule)
    known = {name for name in found.defaults() if name != "views"}
    for name in hyper:
        if name not in known:
            raise TypeError(
                f"build() got an unexpected keyword argument {name!r}{near_miss(name, known)}: it is no "
                f"option of {rule!r}. An option of the fallback goes into its dict: "
                "fallback={'rule': 'adamw', ...}"
            )
    _check_plain(rule)
    options = {"rule": rule, **hyper} | ({} if lr is None else {"lr": lr})
    found.check("build()", {**found.defaults(), **options})
    return options


def _rest(fallback: str | Mapping[str, Any], lr: float | Tensor | None) -> Options:
    """The options of what the main rule does not take."""
    options = as_options("fallback", fallback)
    if "rule" not in options:
        raise ValueError(f"fallback names no rule: {dict(options)!r}")
    found = find_rule(options["rule"])
    if found.hidden_only:
        raise ValueError(
            f"fallback={found.name!r} is for the matrices of hidden layers; the rest needs a rule that takes "
            "every tensor, as 'adamw' or 'lion'"
        )
    _check_names("fallback", options)
    return options | ({} if lr is None else {"lr": lr})


def _check_plain(rule: str) -> None:
    """Refuse a rule whose function is a method of its optimizer's class, which is not the one made here."""
    made = optimizer_class(rule)
    if issubclass(made, OrthogonalizedOptimizer) and made.orthogonalize is not Muon.orthogonalize:
        raise ValueError(
            f"{rule!r} needs {made.__name__}.orthogonalize, which belongs to that class: make it with param "
            "groups of your own, {'params': [...], 'rule': 'adamw'} among them"
        )


def _check_names(what: str, options: Options) -> None:
    _check_plain(options["rule"])
    known = {"rule", *find_rule(options["rule"]).defaults()} - {"views"}
    for name in options:
        if name not in known:
            raise TypeError(f"{what}: {name!r} is no option of {options['rule']!r}{near_miss(name, known)}")


def _carry_over(main: Options, rest: Options) -> None:
    """Give ``rest`` the main learning rate and weight decay, where they mean the same to both rules."""
    if _moves_like_adamw(main) and _moves_like_adamw(rest):
        for name in ("lr", "weight_decay", "weight_decay_method"):
            if name in main and name in find_rule(rest["rule"]).defaults():
                rest.setdefault(name, main[name])


def _moves_like_adamw(options: Options) -> bool:
    """Whether an update has AdamW's rms, so that AdamW's learning rate is right for it."""
    rule = find_rule(options["rule"])
    return rule.moves_like_adamw({**rule.defaults(), **options})


def _options(
    tensor: Routed, role: Role, main: Options, rest: Options, said: Mapping[str, Options]
) -> tuple[Options, str]:
    """(group options, why) of one tensor."""
    takes = role.hidden or not find_rule(main["rule"]).hidden_only
    options, why = dict(main if takes else rest), role.why
    globs = matching(said, tensor)
    wanted = {name: value for glob in globs for name, value in said[glob].items()}
    rule = wanted.get("rule", options["rule"])
    if rule != options["rule"]:
        options = next((dict(known) for known in (main, rest) if known["rule"] == rule), {"rule": rule})
        if options == {"rule": rule}:
            options |= wanted
            _carry_over(main, options)
    if globs:
        why = f"override: {', '.join(map(repr, globs))}, otherwise {role.why}"
        _check_names(f"overrides[{', '.join(map(repr, globs))}]", {**wanted, "rule": rule})
    return options | wanted, why


def _undecayed(model: nn.Module) -> set[str]:
    """Names that the model, or a part of it, lists as not to be decayed: timm's ``no_weight_decay()``."""
    names: set[str] = set()
    for path, module in model.named_modules():
        declare = getattr(module, "no_weight_decay", None)
        if callable(declare) and _takes_nothing(declare):
            names |= {f"{path}.{name}" if path else name for name in declare()}
    return names


def _takes_nothing(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):
        return False
    return True


def _is_exempt(tensor: Routed, undecayed: set[str]) -> bool:
    return not undecayed.isdisjoint(tensor.names) or getattr(tensor.param, "_no_weight_decay", False)


def _could_train(param: Tensor) -> bool:
    """Whether a frozen parameter could be thawed: packed and integer ones cannot."""
    real = param.is_floating_point() or param.is_complex()
    return real and param.dtype.itemsize >= 2 and param.layout is torch.strided


def _group_for(groups: list[Options], tensor: Routed, role: Role, options: Options) -> Options:
    """Put a tensor into the group that has exactly its options, which is made if there is none."""
    if role.batch and "view" in find_rule(options["rule"]).hyper:
        options.setdefault("view", "batch")
    group = next((group for group in groups if _same(group[_OPTIONS], options)), None)
    if group is None:
        group = {"params": [], _OPTIONS: options}
        groups.append(group)
    group["params"].append((tensor.name, tensor.param))
    return group


def _known_view(tensor: Routed, role: Role, options: Options) -> View | None:
    """The view that a tensor is known to need under its rule and options; None where it needs none."""
    known = find_rule(options["rule"]).hyper
    if "views" not in known:
        return None
    if role.batch and "view" not in known:
        # A rule that merges dimensions, and for which both sides of a matrix are alike.
        return rows(*[1] * tensor.param.shape[0])
    counts_matrices = options.get("view") == "batch"
    if is_transposed(role.view) and tensor.param.dim() > 2 and counts_matrices != role.batch:
        # The user sees the dimensions otherwise: which of them to swap is not known then.
        return None
    return role.view


def _same(one: Options, other: Options) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return a is b or not (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b)

    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
