"""Compare a step with the rule's own: what a copy of the optimizer does from the same state and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steepest.engine.layout import real_view
from steepest.engine.storage import CORRECTION, SCALE
from steepest.optimizer import Optimizer
from steepest.rule import Group, Rule, find_rule
from steepest.trust.applied import own_part, spacing, values_of, weight_of, widened
from steepest.trust.errors import VerificationError
from steepest.trust.twin import Twin

__all__ = ["check_replay"]

# How far a step may be from the copy's: relative to the step, and in units of the stored numbers' spacing,
# both as norms over a tensor. Compiled products of matrices round differently; all else is equal to the bit.
_ELEMENTS, _MATRICES = (1e-3, 0.02), (0.02, 0.2)


def check_replay(optimizer: Optimizer, twin: Twin, names: Mapping[Tensor, str]) -> None:
    """Step the copy; raise :class:`VerificationError` where the optimizer's tensors are not the copy's."""
    copied = twin.optimizer
    before = {param: values_of(copied, copy) for param, copy in twin.params.items()}
    twin.step()
    for group in optimizer.param_groups:
        rule = find_rule(group["rule"])
        for param in group["params"]:
            copy = twin.params[param]
            if rule.moves:
                wrong = _packed_weights(optimizer, param, copied, copy)
            else:
                allowed = _MATRICES if rule.transforms else _ELEMENTS
                now, should = (_values(weight_of(*each)) for each in ((optimizer, param), (copied, copy)))
                correction = optimizer.state.get(param, {}).get(CORRECTION)
                stored = (param.dtype.to_real(), None if correction is None else correction.dtype)
                wrong = _difference(now, should, _values(before[param]), stored, allowed)
            wrong = wrong or _state_difference(optimizer, param, copied, copy, rule, group)
            if wrong is not None:
                raise VerificationError(
                    f"{names[param]}, in a group of {rule.name!r}: {wrong}. Something changed the step, or "
                    "another optimizer took it"
                )


def _values(tensor: Tensor) -> Tensor:
    return widened(real_view(own_part(tensor)))


def _difference(
    now: Tensor,
    should: Tensor,
    before: Tensor,
    stored: tuple[torch.dtype, torch.dtype | None],
    allowed: tuple[float, float],
) -> str | None:
    """Return how a tensor differs from what it should be; None if only by rounding."""
    finite = should.isfinite()
    if bool((now.isfinite() != finite).any()):
        return "it has numbers that are not finite where the rule's own step has finite ones, or the opposite"
    off, step = (float(_zeroed(each, finite).norm()) for each in (now - should, should - before))
    unit = float(_zeroed(spacing(*stored, should.abs()), finite).norm())
    if off <= allowed[0] * step + allowed[1] * unit:
        return None
    moved = float(_zeroed(now - before, finite).norm())
    return (
        f"it moved by ‖Δp‖ = {moved:.6g}; the rule's own step, from the "
        f"same state and gradient, is {step:.6g}, and they differ by {off:.6g}"
    )


def _zeroed(tensor: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, tensor, 0.0)


def _packed_weights(optimizer: Optimizer, param: Tensor, copied: Optimizer, copy: Tensor) -> str | None:
    """Compare what a parameter stands for, the packed weights of a ternary layer, with the copy's."""
    pairs: Any = ((optimizer.targets, param), (copied.targets, copy))
    now, should = (targets.find(each).layer.packed for targets, each in pairs)
    if torch.equal(now, should):
        return None
    return f"{int((now != should).sum())} bytes of packed weights are not as the rule's step leaves them"


def _state_difference(
    optimizer: Optimizer, param: Tensor, copied: Optimizer, copy: Tensor, rule: Rule, group: Group
) -> str | None:
    """Compare the state with the copy's; of rules on matrices, what is kept per element and per tensor.

    What is kept per matrix, such as eigenvectors, may differ by more than rounding after rounding.
    """
    now, should = ({**each} for each in (optimizer.state.get(param, {}), copied.state.get(copy, {})))
    names = sorted(should.keys() & rule.state_specs(group).keys() if rule.transforms else should.keys())
    for name in names:
        entry = should[name]
        if name == CORRECTION or not isinstance(entry, Tensor):  # it belongs to the weight
            continue
        mine = now.get(name)
        if not isinstance(mine, Tensor) or mine.shape != entry.shape:
            return f"the state {name!r} is not there, or has another shape than the rule's own step leaves"
        if entry.is_floating_point() or entry.is_complex():
            values, expected = _values(mine), _values(entry)
            stored, allowed = (entry.dtype.to_real(), None), _MATRICES if rule.transforms else _ELEMENTS
            wrong = _difference(values, expected, torch.zeros_like(expected), stored, allowed)
            differs = wrong is not None
        else:  # codes, which rounding moves by one, or counters
            apart = (own_part(mine).long() - own_part(entry).long()).abs()
            differs = bool((apart > (1 if name + SCALE in should else 0)).any())
        if differs:
            return f"the state {name!r} is not what the rule's own step leaves"
    return None
