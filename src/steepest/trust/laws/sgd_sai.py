"""SGD-SaI: the update is one number, fixed once measured, times an average of the gradients."""

from __future__ import annotations

from torch import Tensor

from steepest.trust.applied import AppliedStep

__all__ = ["is_momentum_times_a_constant"]

_TOLERANCE = 1e-3


def is_momentum_times_a_constant(step: AppliedStep) -> str | None:
    """Return what is wrong unless Δp is lr·G·m for the G of the state, and m moved 1−μ of the way to g.

    G may not change once all of its gradients were measured. With ``normalize="max"`` it may, since the
    largest of all tensors may; Δp is then only compared with some constant times m.
    """
    group, before, after = step.group, step.state_before, step.state_after
    average = after.get("momentum_buffer")
    m = step.gradient if average is None else average.to(step.direction.dtype)
    # As far as m itself is rounded: in its own dtype, or in one byte.
    eps = 2.0**-6 if group["state_dtype"] == "int8" else _TOLERANCE
    if average is not None and average.element_size() == 2:
        eps = 2.0**-8
    ratio = _ratio(step.direction, m)
    allowed = float(step.rounding.norm()) + eps * abs(ratio) * float(m.norm())
    if float((step.direction - ratio * m).norm()) > allowed:
        return "Δp/(lr·m) must be the same number for all elements, and is not: Δp is not along the momentum"
    measured, gsnr = float(after["measured"]), float(after["gsnr"])
    step.report["gain"] = ratio
    slack = allowed / max(float(m.norm()), 1e-300)
    gain = gsnr if measured > 0 or gsnr > 0 else 1.0
    if group["normalize"] == "none" and abs(ratio - gain) > slack + eps * gain and float(m.norm()) > 0:
        return f"Δp must be lr·G·m with the measured G = {gain:.6g}, and is lr·{ratio:.6g}·m"
    if not before:
        return None
    settled = float(before["measured"]) >= group["warmup_batches"]
    if settled and float(before["gsnr"]) != gsnr:
        return f"G = {float(before['gsnr']):.6g} was measured, and is {gsnr:.6g} now; it must not change"
    if not settled or average is None:
        return None
    old, g, mu = before["momentum_buffer"].to(m.dtype), step.gradient, group["momentum"]
    allowed = eps * (float(m.norm()) + float(old.norm()))
    way = _ratio(m - old, g - old)
    if float((m - old - (1 - mu) * (g - old)).norm()) > allowed:
        return f"m must move {1 - mu:.6g} of the way to the gradient, and moved {way:.6g} of it"
    return None


def _ratio(one: Tensor, other: Tensor) -> float:
    square = float(other.square().sum())
    return float((one * other).sum()) / square if square > 0 else 0.0
