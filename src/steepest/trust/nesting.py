"""Tell the step that a training calls from those that a subclass's own ``step()`` calls within it."""

from __future__ import annotations

import sys

import torch

__all__ = ["is_nested"]

# torch wraps this function around the step of every class, as soon as an instance of that class is made.
_AROUND_STEP = torch.optim.Optimizer.profile_hook_step(lambda self: None).__code__


def is_nested(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step hook was called by a step of this optimizer within another step of it.

    The call stack tells, where a count of hooks could not: no hook is called after a step that raises.
    """
    frame, steps = sys._getframe(), 0
    while frame is not None:
        steps += frame.f_code is _AROUND_STEP and frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return steps > 1
