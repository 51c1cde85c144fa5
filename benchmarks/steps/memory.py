"""Memory planning: estimate the memory of cases and batch them so that they fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from steepest.model_shapes import ParamShape

from .case import Case
from .params import meta_params

# Besides their state, some peers allocate a copy of all parameters during a step.
_TEMPORARY_COPIES = 1.0


def planned_state_bytes(case: Case, tensors: Sequence[ParamShape], dtype: torch.dtype) -> int | None:
    """Count the state bytes of one of steepest's optimizers for these tensors on the meta device.

    Returns None if the optimizer cannot be constructed there.

    Example:
        >>> from benchmarks.steps.case import ours
        >>> planned_state_bytes(ours("adamw", "eager"), [ParamShape("a", (10, 10))], torch.float32)
        808
    """
    try:
        optimizer = case.make(meta_params(tensors, dtype))
    except (RuntimeError, NotImplementedError, ValueError):
        return None
    explain = getattr(optimizer, "explain", None)
    return None if explain is None else sum(total.state_bytes for total in explain().totals)


def estimated_bytes(case: Case, tensors: Sequence[ParamShape], dtype: torch.dtype) -> int:
    """Estimate the bytes that a case needs besides parameters and gradients."""
    param_bytes = sum(tensor.numel for tensor in tensors) * dtype.itemsize
    planned = planned_state_bytes(case, tensors, dtype) if case.ours else None
    # The temporary memory of steepest's steps is bounded and small.
    return int(param_bytes * (case.state_copies + _TEMPORARY_COPIES)) if planned is None else planned


def batch_by_memory(
    cases: Sequence[Case], needs: Mapping[str, int], limit: int
) -> tuple[list[list[Case]], list[Case]]:
    """Return (batches of cases that fit into `limit` bytes together, cases that do not fit).

    The first case that fits is the reference and belongs to every batch, so that all others are compared
    with it in the same rounds.

    Example:
        >>> from benchmarks.steps.case import ours
        >>> a, b, c = (ours("lion", "eager", label) for label in "abc")
        >>> batches, too_large = batch_by_memory([a, b, c], {a.key: 2, b.key: 3, c.key: 9}, 6)
        >>> [[case.label for case in batch] for batch in batches], [case.label for case in too_large]
        ([['a', 'b']], ['c'])
    """
    fitting = [case for case in cases if needs[case.key] <= limit]
    too_large = [case for case in cases if needs[case.key] > limit]
    if not fitting:
        return [], too_large
    reference, rest = fitting[0], fitting[1:]
    available = limit - needs[reference.key]
    batches: list[list[Case]] = [[reference]]
    used = 0
    for case in rest:
        if needs[case.key] > available:
            too_large.append(case)
            continue
        if used + needs[case.key] > available:
            batches.append([reference])
            used = 0
        batches[-1].append(case)
        used += needs[case.key]
    return batches, too_large
