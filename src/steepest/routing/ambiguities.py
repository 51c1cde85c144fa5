"""Warn about output layers that build() had to guess, each with the override that settles the question."""

from __future__ import annotations

from collections.abc import Sequence, Set

from torch import nn

from steepest.routing.output_layers import BY_POSITION, find_overlooked, find_trailing
from steepest.routing.roles import Role
from steepest.routing.tensors import Routed

__all__ = ["find_ambiguities"]


def find_ambiguities(
    model: nn.Module,
    tensors: Sequence[Routed],
    roles: Sequence[Role],
    settled: Sequence[bool],
    main: str,
    rest: str,
) -> list[str]:
    """Write a warning for each group of output layers that were guessed, not found, or not counted.

    Args:
        model: the model.
        tensors: its parameters.
        roles: the role of each of them.
        settled: whether an override names the rule of each of them; such a tensor is never ambiguous.
        main: the name of the rule for matrices of hidden layers.
        rest: the name of the fallback.
    """
    pairs = list(zip(tensors, roles, settled, strict=True))
    outputs = {id(o.module) for t, role, _ in pairs if role.kind == "output" for o in t.owners}
    tied = any(role.kind == "embedding" and role.reason.endswith("(tied)") for role in roles)
    hidden = [(tensor, done) for tensor, role, done in pairs if role.hidden]

    warnings = []
    guessed = [t.name for t, role, done in pairs if role.reason == BY_POSITION and not done]
    if guessed:
        others = _weights(find_trailing(model), hidden)
        also = _override(others, rest) if others else f"overrides={{...: {rest!r}}}"
        warnings.append(
            f"{', '.join(guessed)} is taken for the output, because it is the model's last linear map; no "
            f"name says so. If it belongs to a hidden layer: {_override(guessed, main)}. If the model has "
            f"other outputs, {main!r} takes them as hidden: {also}"
        )
    overlooked = _weights(find_overlooked(model, outputs), hidden)
    if overlooked:
        are = (
            "has the name of an output, or is in a module that has one, and goes"
            if len(overlooked) == 1
            else "have names of outputs, or are in modules that have one, and go"
        )
        warnings.append(
            f"{', '.join(overlooked)} {are} to {main!r} as hidden. If it is an output: "
            f"{_override(overlooked, rest)}; if not, {main!r} there says so"
        )
    if not outputs and not tied:
        last = [name for name in _weights(find_trailing(model), hidden) if name not in overlooked]
        if last:
            warnings.append(
                f"no output layer was found, and {main!r} takes {', '.join(last)} as hidden. If that is an "
                f"output: {_override(last, rest)}; if not, {main!r} there says so"
            )
    return warnings


def _weights(layers: Set[int], hidden: Sequence[tuple[Routed, bool]]) -> list[str]:
    """Names of the layers' weights that are taken as hidden and whose rule no override names."""
    return [
        tensor.name
        for tensor, done in hidden
        if not done and any(id(owner.module) in layers for owner in tensor.owners)
    ]


def _override(names: Sequence[str], rule: str) -> str:
    """The argument of build() that gives these parameters to a rule."""
    return "overrides={" + ", ".join(f"{name!r}: {rule!r}" for name in names) + "}"
