"""Describe in words how a parameter's state per element is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from steepest.engine.storage import CORRECTION, SCALE, block_of
from steepest.hyperparameters import is_int8
from steepest.rule import Group, Rule

__all__ = ["master_words", "state_words"]


def state_words(
    rule: Rule, group: Group, param: Tensor, label: str | None, state: Mapping[str, Tensor]
) -> str | None:
    """Return the formats of the averages, as in ``"int8/64"``; None where there are none.

    Where one byte was asked for and the tensor is not coded, the reason follows, as in
    ``"float32 (rows of 147)"``.
    """
    averages = [name for name, spec in rule.state_specs(group).items() if spec.range is not None]
    found = [(state[name], state.get(name + SCALE)) for name in averages if name in state]
    if not found:
        return None
    words = {
        str(entry.dtype)[6:] if scale is None else f"int8/{entry.numel() // scale.numel()}"
        for entry, scale in found
    }
    why = ""
    if is_int8(group["state_dtype"]) and not any(scale is not None for _, scale in found):
        why = f" ({_why_not(param, label, group)})"
    return ", ".join(sorted(words)) + why


def master_words(state: Mapping[str, Tensor]) -> str | None:
    """Return the format of the master weight, or None where none is kept."""
    if CORRECTION not in state:
        return None
    return f"split{8 * state[CORRECTION].itemsize}"


def _why_not(param: Tensor, label: str | None, group: Group) -> str:
    """Return why a parameter is not coded; see :func:`~steepest.engine.storage.storage_of`."""
    shape = (*param.shape, 2) if param.is_complex() else tuple(param.shape)
    numel = math.prod(shape)
    if len(shape) < 2:
        return "vector"
    if numel < 4096:
        return f"{numel} elements"
    row = numel // shape[0]
    if row % 32:
        return f"rows of {row}"
    view = (group.get("views") or {}).get(label)
    if block_of(param, view) is not None:
        return "stored before"
    return "view" if view else "shards cut blocks"
