"""Tell of output layers that build() had to guess, each with the override that settles the question."""

from __future__ import annotations

from collections.abc import Sequence, Set

from torch import nn

from steepest.routing.output_layers import BY_POSITION, find_overlooked, find_trailing
from steepest.routing.roles import Role
from steepest.routing.tensors import Routed

__all__ = ["find_ambiguities"]


def find_ambiguities(
    model: nn.Module, routed: Sequence[tuple[Routed, Role, bool]], main: str, rest: str
) -> tuple[list[str], list[str]]:
    """Write notes and warnings of output layers that were guessed, not found, or not counted.

    Only a guess that the order of the modules confirms is a note. ``routed`` has each tensor with its role,
    and whether an override names its rule, which settles it. A frozen tensor needs no answer: PEFT keeps
    frozen copies of output layers that it trains.
    """
    outputs = {id(o.module) for each, role, _ in routed if role.kind == "output" for o in each.owners}
    tied = any(role.reason.endswith("(tied)") for _, role, _ in routed)
    unsettled = [(each, role) for each, role, settled in routed if each.param.requires_grad and not settled]

    def hidden(layers: Set[int]) -> list[str]:
        """Return the names of the layers' weights that are taken as hidden."""
        taken = [each for each, role in unsettled if role.hidden]
        return [each.name for each in taken if not layers.isdisjoint(id(o.module) for o in each.owners)]

    trailing, overlooked = hidden(find_trailing(model)), hidden(find_overlooked(model, outputs))
    notes: list[str] = []
    warnings: list[str] = []
    guessed = [tensor.name for tensor, role in unsettled if role.reason == BY_POSITION]
    if guessed:
        guess = (
            f"{', '.join(guessed)} is treated as the output layer because it is the model's last linear map, "
            f"not because of its name. If it is a hidden layer, pass {_override(guessed, main)}"
        )
        if not (trailing or overlooked) and all(_runs_in_order(model, name) for name in guessed):
            notes.append(guess)
        else:
            also = _override(trailing, rest) if trailing else f"overrides={{...: {rest!r}}}"
            warnings.append(
                f"{guess}. If the model has other output layers, {main!r} treats them as hidden: pass {also}"
            )
    if overlooked:
        are = (
            "is named like an output layer, or is in a module that is, but goes"
            if len(overlooked) == 1
            else "are named like output layers, or are in modules that are, but go"
        )
        warnings.append(
            f"{', '.join(overlooked)} {are} to {main!r} as hidden. If it is an output, pass "
            f"{_override(overlooked, rest)}; if not, pass {main!r} there to confirm"
        )
    last = [name for name in trailing if name not in overlooked]
    if last and not outputs and not tied:
        warnings.append(
            f"no output layer was found, so {main!r} treats {', '.join(last)} as hidden. If that is an "
            f"output, pass {_override(last, rest)}; if not, pass {main!r} there to confirm"
        )
    return notes, warnings


def _runs_in_order(model: nn.Module, name: str) -> bool:
    """Return whether all modules around a parameter run in the order in which they are registered."""
    module = model
    for part in name.split(".")[:-1]:
        if not isinstance(module, nn.Sequential) and len([*module.children()]) > 1:
            return False
        module = module.get_submodule(part)
    return True


def _override(names: Sequence[str], rule: str) -> str:
    """Return the argument of build() that gives these parameters to a rule."""
    return "overrides={" + ", ".join(f"{name!r}: {rule!r}" for name in names) + "}"
