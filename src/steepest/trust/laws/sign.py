r"""Sign descent: after the decay is taken out, every element has moved by lr or not at all."""

from __future__ import annotations

import torch

from steepest.trust.applied import AppliedStep

__all__ = ["is_a_sign"]


def is_a_sign(step: AppliedStep) -> str | None:
    r"""Return what is wrong unless every \|Δp\| is lr or 0, to within the rounding of p."""
    direction = step.direction
    if step.group.get("decay_overshoot"):
        direction = direction - step.group["weight_decay"] * step.before.sign()
    size = direction.abs()
    off = torch.minimum(size, (size - 1).abs()) - step.rounding
    if float(off.max()) <= 0:
        return None
    worst = int(off.flatten().argmax())
    return (
        f"|Δp| must be lr·1 or lr·0 after decay; {int((off > 0).sum())} of {size.numel()} elements are "
        f"neither, and element {worst} moved by {float(size.flatten()[worst]):.6g}·lr"
    )
