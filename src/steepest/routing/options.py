"""Group options: the main rule's, the fallback's, and each tensor's after overrides by patterns of names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor

from steepest.hyperparameters import make_plain, near_miss, plain
from steepest.registry import optimizer_class
from steepest.routing.layers import check_layer_decay
from steepest.routing.roles import Role
from steepest.routing.tensors import Routed
from steepest.routing.wrappers import spellings
from steepest.rule import find_rule
from steepest.rules.muon import Muon
from steepest.rules.orthogonalized import OrthogonalizedOptimizer

__all__ = [
    "Options",
    "as_options",
    "as_table",
    "check_options",
    "matching",
    "needs_its_class",
    "tensor_options",
]

Options: TypeAlias = dict[str, Any]

# Keywords of build() that are no options of a rule.
_OWN = {"fallback", "fallback_lr", "overrides", "views", "decay_vectors", "layer_decay", "ternary", "memory"}


def check_options(
    rule: str,
    params: Iterable[Tensor],
    /,
    *,
    lr: float | Tensor | None = None,
    fallback: str | Mapping[str, Any] = "adamw",
    fallback_lr: float | Tensor | None = None,
    overrides: Mapping[str, str | Mapping[str, Any]] | None = None,
    memory: str | None = None,
    layer_decay: Any = None,
    ternary: Any = None,
    **hyper: Any,
) -> tuple[Options, Options, dict[str, Options]]:
    """Check what can be said of build()'s options without a model.

    Returns the main rule's options, the fallback's, and the overrides' by their patterns. ``params`` are
    those of the model, if there is one already.
    """
    if not (ternary is None or isinstance(ternary, (bool, Mapping))):
        raise TypeError(f"ternary must be a dict of TernaryFlip's options, a bool or None, got {ternary!r}")
    if layer_decay is not None:
        check_layer_decay(layer_decay)
    if memory not in (None, "least") and "memory" in find_rule(rule).hyper:
        hyper = {**hyper, "memory": memory}
    elif memory is not None:
        hyper = {**_least_memory(memory, params), **hyper}
    main = _main_options(rule, lr, hyper)
    rest = _fallback_options(fallback, fallback_lr, main)
    table = _as_patterns("overrides", overrides)
    named = {pattern: as_options(f"overrides[{pattern!r}]", value) for pattern, value in table.items()}
    rules = {
        main["rule"],
        rest["rule"],
        *(options["rule"] for options in named.values() if "rule" in options),
    }
    for pattern, options in named.items():
        what = f"overrides[{pattern!r}]"
        if "rule" in options:
            find_rule(options["rule"])
            _check_names(what, options)
        elif strange := options.keys() - {name for each in rules for name in find_rule(each).defaults()}:
            # Which rule the option must be of, only the model can tell.
            name = min(strange)
            raise TypeError(
                f"{what}: {name!r} is no option{near_miss(name, find_rule(main['rule']).defaults())}"
            )
    return main, rest, named


def _main_options(rule: str, lr: float | Tensor | None, hyper: Mapping[str, Any]) -> Options:
    """Check the main rule's options and return them; they become the optimizer's defaults."""
    found = find_rule(rule)
    known = {name for name in found.defaults() if name != "views"}
    for name in hyper:
        if name not in known:
            raise TypeError(
                f"build() got an unexpected keyword argument {name!r}{near_miss(name, known | _OWN)}: it is "
                f"no option of {rule!r}. Options of the fallback go into its dict: "
                "fallback={'rule': 'adamw', ...}"
            )
    _refuse_methods(rule)
    options = {"rule": rule, **hyper} | ({} if lr is None else {"lr": lr})
    make_plain(options, known)
    found.check("build()", {**found.defaults(), **options})
    return options


def _fallback_options(fallback: str | Mapping[str, Any], lr: float | Tensor | None, main: Options) -> Options:
    """Check the options for the tensors that the main rule does not take, and return them."""
    options = as_options("fallback", fallback)
    if "rule" not in options:
        raise ValueError(f"fallback names no rule: {dict(options)!r}")
    found = find_rule(options["rule"])
    if found.hidden_only:
        raise ValueError(
            f"fallback={found.name!r} is for the matrices of hidden layers; the other tensors need a rule "
            "that takes every tensor, such as 'adamw' or 'lion'"
        )
    _check_names("fallback", options)
    options |= {} if lr is None else {"lr": plain(lr)}
    _carry_over(main, options)
    found.check("build(), fallback", {**found.defaults(), **options})
    return options


def tensor_options(
    role: Role, main: Options, fallback: Options, patterns: list[str], wanted: Options
) -> tuple[Options, str]:
    """Return one tensor's group options, and the reason for them as ``explain()`` shows it.

    ``wanted`` merges the overrides of these patterns.
    """
    takes = role.hidden or not find_rule(main["rule"]).hidden_only
    options, why = dict(main if takes else fallback), role.why
    rule = wanted.get("rule", options["rule"])
    if rule != options["rule"]:
        options = next((dict(known) for known in (main, fallback) if known["rule"] == rule), {"rule": rule})
        if options == {"rule": rule}:
            options |= wanted
            _carry_over(main, options)
    if patterns:
        named = ", ".join(map(repr, patterns))
        why = f"override: {named}, otherwise {role.why}"
        _check_names(f"overrides[{named}]", {**wanted, "rule": rule})
    return options | wanted, why


def _carry_over(main: Options, other: Options) -> None:
    """Give another rule the main learning rate and weight decay if they mean the same to both rules."""
    for options in (main, other):
        rule = find_rule(options["rule"])
        if not rule.moves_like_adamw({**rule.defaults(), **options}):
            return
    for name in ("lr", "weight_decay", "weight_decay_method"):
        if name in main and name in rule.defaults():
            other.setdefault(name, main[name])


def _check_names(what: str, options: Options) -> None:
    """Raise ``TypeError`` for an option that the rule does not know; ``views`` has an argument of its own."""
    _refuse_methods(options["rule"])
    known = {"rule", *find_rule(options["rule"]).defaults()} - {"views"}
    for name in options:
        if name not in known:
            raise TypeError(f"{what}: {name!r} is no option of {options['rule']!r}{near_miss(name, known)}")


def needs_its_class(rule: str) -> bool:
    """Tell whether a rule calls a method of its optimizer class: build() makes an optimizer of another."""
    made = optimizer_class(rule)
    return issubclass(made, OrthogonalizedOptimizer) and made.orthogonalize is not Muon.orthogonalize


def _refuse_methods(rule: str) -> None:
    if needs_its_class(rule):
        made = optimizer_class(rule).__name__
        raise ValueError(
            f"{rule!r} needs {made}.orthogonalize, a method of that class: make the class yourself, "
            "with param groups such as {'params': [...], 'rule': 'adamw'} for the other tensors"
        )


def as_options(what: str, value: str | Mapping[str, Any]) -> Options:
    """Return group options as a dict; a string is the name of a rule."""
    if isinstance(value, str):
        return {"rule": value}
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: plain(option) for name, option in value.items()}
    raise TypeError(f"{what} must be a rule's name or a dict of group options, got {value!r}")


def as_table(what: str, value: Mapping[str, Any] | None, tensors: list[Routed]) -> dict[str, Any]:
    """Return a mapping from patterns as a dict; refuse one with a pattern that matches no parameter.

    Only parameters that train are suggested in its place.
    """
    table = _as_patterns(what, value)
    names = [name for tensor in tensors for name in spellings(tensor.names)]
    trained = [name for tensor in tensors if tensor.param.requires_grad for name in spellings(tensor.names)]
    ends = {
        ".".join(["*", *name.split(".")[cut:]]) for name in trained for cut in range(1, name.count(".") + 1)
    }
    for pattern in table:
        if not _matches(pattern, names):
            close = near_miss(pattern, sorted(ends) if "*" in pattern else trained)
            raise ValueError(f"{what}: {pattern!r} matches no parameter of the model{close}")
    return dict(table)


def _as_patterns(what: str, value: Mapping[str, Any] | None) -> Mapping[str, Any]:
    table = {} if value is None else value
    if not (isinstance(table, Mapping) and all(isinstance(pattern, str) for pattern in table)):
        raise TypeError(f"{what} must be a dict whose keys are patterns of parameter names, got {value!r}")
    return table


def matching(table: Mapping[str, Any], tensor: Routed) -> list[str]:
    """Return the patterns of ``table``, in its order, that match one of the tensor's names.

    The names count as they are, and without what wrappers add to them.
    """
    names = spellings(tensor.names)
    return [pattern for pattern in table if _matches(pattern, names)]


def _matches(pattern: str, names: Iterable[str]) -> bool:
    """Return whether the pattern equals a name, which may contain brackets itself, or matches one."""
    return any(pattern == name or fnmatchcase(name, pattern) for name in names)


def _least_memory(memory: str, params: Iterable[Tensor]) -> Options:
    """Return the common options of ``build(…, memory="least")``."""
    if memory != "least":
        raise ValueError(f"memory must be None or 'least', got {memory!r}")
    options: Options = {"state_dtype": "int8"}
    if any(param.dtype in (torch.bfloat16, torch.float16) for param in params):
        options |= {"master": "split8", "rounding": "stochastic"}
    return options
