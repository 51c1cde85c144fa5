"""PSGD: the update's rms is clipped, and each fit damps what its preconditioner amplifies too much."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from steepest.trust.applied import AppliedStep

__all__ = ["is_clipped_and_whitens"]

_CLIP = 1.1
_MUCH = 2.0  # times too large: then the fit is larger than the noise that is added for damping


def is_clipped_and_whitens(step: AppliedStep) -> str | None:
    r"""Return what is wrong unless rms(Δp/lr) ≤ 1.1, or 0.22 with AdamW's rms, and Q is fitted.

    With P the preconditioners of the state, A = P_l m P_r is white if E[A Aᵀ] = n I and E[Aᵀ A] = m I, so
    that σ₁(A)² is at most about max(m, n) on the average. Where the old P makes σ₁² more than twice that, the
    fit must have made it smaller for the same m. Only a Q in float32 at least can be seen to move, where two
    dense factors, or one vector, are fitted in every step.
    """
    group = step.group
    most = _CLIP / (5 if group["lr_style"] == "adam" else 1)
    after = step.state_after
    target = (
        step.gradient if group["whiten"] == "gradient" else after["momentum_buffer"].to(step.gradient.dtype)
    )
    blocks = zip(*map(step.matrices, (step.direction, step.rounding, target)), strict=True)
    for (suffix, direction), (_, error), (_, m) in blocks:
        if direction.numel() == 0:
            continue
        rms = float(direction.square().mean().sqrt())
        step.report["update_rms"] = rms
        allowed = most * 1.01 + float(error.square().mean().sqrt())
        if rms > allowed:
            return f"rms(Δp/lr) must be ≤ {most:g}, and is {rms:.4g}"
        if said := _fitted(step, suffix, m):
            return said
    return None


def _fitted(step: AppliedStep, suffix: str, m: Tensor) -> str | None:
    group, before, after = step.group, step.state_before, step.state_after
    if group["literal"] or group["update_probability"] < 1 or group["state_dtype"] == "int8":
        return None
    names = [name + suffix for name in ("Q", "Q_left", "Q_right") if name + suffix in before]
    factors = [before[name] for name in names]
    is_vector = len(factors) == 1
    if not names or not (is_vector or all(each.dim() == 2 for each in factors)):
        return None
    if any(torch.finfo(each.dtype).eps > 1e-6 for each in factors) or float(before[f"scale{suffix}"]) == 0:
        return None
    old, new = (_amplified(state, names, suffix, m) for state in (before, after))
    size = 1 if is_vector else max(m.shape)
    step.report["whitening_residual"] = _residual(new)
    one, other = (
        each.abs().amax() if is_vector else torch.linalg.matrix_norm(each, ord=2) for each in (old, new)
    )
    excess = float(one.square()) / size
    bound = max(float(after[name.replace("Q", "L")]) for name in names) / size
    # What a first-order step of the smallest allowed size does, less a margin for its second order.
    pace = min(group["preconditioner_lr"], group["preconditioner_min_lr"]) * (excess - 1) / bound
    if excess > _MUCH and pace > 1e-3 and float(other) > float(one) * (1 - pace / 8):
        return (
            f"the preconditioner makes the largest singular value of the momentum {excess**0.5:.4g} times as "
            f"large as a white one's, and the fit did not damp it: {float(one):.6g} → {float(other):.6g}"
        )
    return None


def _amplified(state: Mapping[str, Tensor], names: list[str], suffix: str, m: Tensor) -> Tensor:
    """Return A = P_l m P_r, by the factors of a state."""
    s = state[f"scale{suffix}"].to(m.dtype)
    metrics = [q.to(m.dtype) for q in (state[name] for name in names)]
    if len(metrics) == 1:
        vector: Tensor = m * metrics[0].square() * s**2
        return vector
    left, right = (q.mT @ q for q in metrics)
    matrix: Tensor = (left @ m @ right) * s**4
    return matrix


def _residual(a: Tensor) -> float:
    """Return ‖A Aᵀ/n − I‖_F/√m of the shorter side, or of a vector: 0 if this one sample is white."""
    if a.dim() == 1:
        return float((a.square() - 1).square().mean().sqrt())
    a = a if a.shape[0] <= a.shape[1] else a.mT
    t = a @ a.mT / a.shape[1]
    t.diagonal().sub_(1)
    return float(t.norm()) / math.sqrt(t.shape[0])
