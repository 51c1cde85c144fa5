"""What build() had to guess about a model's outputs: warnings, each with the override that settles it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from steepest.routing.output_layers import BY_POSITION, find_overlooked, find_trailing
from steepest.routing.roles import Role
from steepest.routing.tensors import Routed

__all__ = ["find_doubts"]


def find_doubts(
    model: nn.Module,
    tensors: Sequence[Routed],
    roles: Sequence[Role],
    settled: Sequence[bool],
    main: str,
    rest: str,
) -> list[str]:
    """Warnings about the outputs that were guessed, not found, or not counted.

    Args:
        model: the model.
        tensors: its parameters.
        roles: what each of them is.
        settled: whether an override names the rule of each of them: there is no doubt then.
        main: the name of the rule for matrices of hidden layers.
        rest: the name of the fallback.
    """
    pairs = list(zip(tensors, roles, settled, strict=True))
    outputs = {id(o.module) for t, role, _ in pairs if role.kind == "head" for o in t.owners}
    tied = any(role.kind == "embedding" and role.reason.endswith("(tied)") for role in roles)
    hidden = [(tensor, done) for tensor, role, done in pairs if role.hidden]

    doubts = []
    guessed = [t.name for t, role, done in pairs if role.reason == BY_POSITION and not done]
    if guessed:
        others = _weights(find_trailing(model), hidden)
        also = _line(others, rest) if others else f"overrides={{...: {rest!r}}}"
        doubts.append(
            f"{', '.join(guessed)} is taken for the output, since it is the last linear map of the model: no "
            f"name says so. If it belongs to a hidden layer: {_line(guessed, main)}. What other outputs "
            f"there are, {main!r} takes as hidden: {also} if so"
        )
    overlooked = _weights(find_overlooked(model, outputs), hidden)
    if overlooked:
        are = (
            "has an output's name, or is in a module that has, and goes"
            if len(overlooked) == 1
            else ("have outputs' names, or are in modules that have, and go")
        )
        doubts.append(
            f"{', '.join(overlooked)} {are} to {main!r} as hidden. If it is an output: "
            f"{_line(overlooked, rest)}; {main!r} there says that it is none"
        )
    if not outputs and not tied:
        last = [name for name in _weights(find_trailing(model), hidden) if name not in overlooked]
        if last:
            doubts.append(
                f"no output layer was found, and {main!r} takes {', '.join(last)} as hidden. If that is an "
                f"output: {_line(last, rest)}; {main!r} there says that it is none"
            )
    return doubts


def _weights(layers: Collection[nn.Module], hidden: Sequence[tuple[Routed, bool]]) -> list[str]:
    """Names of the layers' weights that are taken as hidden and of which no override says more."""
    wanted = {id(layer) for layer in layers}
    return [
        tensor.name
        for tensor, done in hidden
        if not done and any(id(owner.module) in wanted for owner in tensor.owners)
    ]


def _line(names: Sequence[str], rule: str) -> str:
    return "overrides={" + ", ".join(f"{name!r}: {rule!r}" for name in names) + "}"
