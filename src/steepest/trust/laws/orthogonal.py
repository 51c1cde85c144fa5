"""Muon and its variants: where the singular values of the update lie, by the polynomials that make them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steepest.linalg.coefficients import coefficient_set
from steepest.linalg.gram_polynomial import Polynomial
from steepest.linalg.normalization import Normalization
from steepest.rule import Group
from steepest.rules.muon import scale_factor
from steepest.trust.applied import AppliedStep

__all__ = [
    "holds_the_norm",
    "is_scaled_by_its_dual_norm",
    "keeps_the_polar_norm",
    "polar_band",
    "singular_values_in_band",
]

# Singular values of the input, over its norm, from which the band's lower end holds. Half precision moves
# them by its rounding, and directions that were smaller than that may come out as anything.
_LEAST, _LEAST_HALF = 1e-3, 2e-2
# What rounding adds to the band. In half precision polynomials without a margin overshoot more where the norm
# is near the spectral one.
_SLACK, _SLACK_HALF, _SLACK_TIGHT = 0.02, 0.15, 0.45
_POWERS: dict[Normalization, int] = {"frobenius": 2, "schatten4": 4, "schatten8": 8}


class _Matrix(NamedTuple):
    """One matrix: Δ/(lr·scale), the input's singular values over its norm, and the band they allow."""

    direction: Tensor
    given: Tensor
    error: float
    shares: Tensor
    low: float
    high: float
    least: float
    rank: int


def singular_values_in_band(step: AppliedStep) -> str | None:
    """Return what is wrong unless the singular values of Δp/(lr·scale) lie in the coefficient set's band.

    No value may be above it. As many values must be at least at its lower end as the input has singular
    values of 0.001 (0.02 in half precision) of its norm or more; smaller ones legitimately end lower.
    """
    for matrix in _matrices(step, step.group.get("radius") or 1.0):
        if said := _outside(matrix, torch.linalg.svdvals(matrix.direction), step):
            return said
    return None


def is_scaled_by_its_dual_norm(step: AppliedStep) -> str | None:
    r"""Return what is wrong unless Δp/lr is ⟨O, u⟩·O for an O with singular values in the band.

    Then ⟨Δp/lr, u⟩ = ⟨O, u⟩², from which O follows.
    """
    for matrix in _matrices(step, 1.0):
        square = float((matrix.direction * matrix.given).sum())
        if float(matrix.direction.norm()) <= matrix.error:
            continue
        if square <= 0:
            return "⟨Δp, u⟩ must be above 0: the step is not a descent along u"
        size = math.sqrt(square)
        # An error of the direction also moves ⟨O, u⟩, and with it all singular values alike.
        error = matrix.error / size * (1 + float(matrix.given.norm()) / size)
        values = torch.linalg.svdvals(matrix.direction) / size
        if said := _outside(matrix._replace(error=error), values, step):
            return said
    return None


def keeps_the_polar_norm(step: AppliedStep) -> str | None:
    r"""Return what is wrong unless ‖Δp‖_F/(lr·scale) is the Frobenius norm of an O in the band."""
    for matrix in _matrices(step, 1.0):
        norm = float(matrix.direction.norm())
        sure = int((matrix.shares >= matrix.least).sum())
        low = max(matrix.low, 0.0) * math.sqrt(sure) - matrix.error
        high = matrix.high * math.sqrt(matrix.rank) + matrix.error
        step.report["norm"] = norm
        if not low <= norm <= high:
            return f"‖Δp‖/(lr·scale) must be in [{low:.4g}, {high:.4g}], and is {norm:.4g}"
    return None


def holds_the_norm(step: AppliedStep) -> str | None:
    """Return what is wrong unless ‖p‖_F stays at its radius, and p turns by at most the angle arcsin(lr)."""
    blocks = zip(*map(step.matrices, (step.before, step.after, step.rounding)), strict=True)
    for (suffix, before), (_, after), (_, rounding) in blocks:
        held = step.state_after[f"norm{suffix}"].to(after.dtype).flatten()
        flat = (each.reshape(-1, *each.shape[-2:]) for each in (before, after, rounding))
        for was, now, off, radius in zip(*flat, held.tolist(), strict=True):
            norm, allowed = float(now.norm()), float(off.norm()) * step.lr + 1e-5 * radius
            if abs(norm - radius) > allowed and not torch.equal(was, now):
                return f"‖p‖ must be {radius:.6g}, and is {norm:.6g} after the step"
            # At first a matrix may have another norm than the radius that was asked for.
            chord = float((now - was).norm())
            most = 2 * radius * math.sin(math.asin(min(step.lr, 1.0)) / 2)
            if (
                abs(float(was.norm()) - radius) <= allowed
                and step.lr < 1
                and chord > most * (1 + 1e-4) + 2 * allowed
            ):
                return f"p must turn by at most arcsin(lr), so that ‖Δp‖ ≤ {most:.4g}; it is {chord:.4g}"
    return None


@functools.lru_cache(maxsize=64)
def polar_band(polynomials: tuple[Polynomial, ...], margin: float = 1.0) -> tuple[float, float]:
    """Return the least of p(σ) for σ in [0.001, 1]/margin, and the largest of |p(σ)| for σ in [0, 1]/margin.

    p is the composition of the polynomials.

    >>> low, high = polar_band(((1.5, -0.5),) * 20)  # the classical cubic
    >>> round(low, 3), round(high, 3)
    (1.0, 1.0)
    """
    sigma = torch.cat([torch.linspace(0, 1e-3, 513), torch.logspace(-3, 0, 8192)]).double() / margin
    value = sigma
    for polynomial in polynomials:
        square = value * value
        total = torch.zeros_like(value)
        for coefficient in reversed(polynomial):
            total = total * square + coefficient
        value = value * total
    return float(value[513:].min()), float(value.abs().max())


def _outside(matrix: _Matrix, values: Tensor, step: AppliedStep) -> str | None:
    error, low, high = matrix.error, matrix.low, matrix.high
    largest = float(values.amax())
    step.report["largest singular value"] = largest
    if largest > high + error:
        return (
            f"the singular values of Δp/(lr·scale) must be ≤ {high + error:.4g}; the largest is {largest:.4g}"
        )
    sure = int((matrix.shares >= matrix.least).sum())
    if sure == 0:
        return None
    last = float(values[sure - 1])
    step.report["smallest singular value"] = last
    if last < low - error:
        return (
            f"{sure} singular values of Δp/(lr·scale) must be ≥ {low - error:.4g}, as many as the momentum "
            f"has above {matrix.least:g} of its norm; value {sure} is {last:.4g}"
        )
    return None


def _matrices(step: AppliedStep, factor: float) -> Iterator[_Matrix]:
    given, error = _input(step)
    blocks = zip(*map(step.matrices, (step.direction, step.rounding, given, error)), strict=True)
    for (_, direction), (_, rounding), (_, u), (_, off) in blocks:
        rows, columns = direction.shape[-2:]
        scale = scale_factor(step.group["scale"], rows, columns) * step.group["extra_scale"] * factor
        if scale == 0:
            continue
        flat = (each.reshape(-1, rows, columns) for each in (direction / scale, rounding / scale, u, off))
        # The factor of ⟨O, u⟩, which PolarGrad takes without the extra one.
        dual = scale / step.group["extra_scale"]
        for one, noise, x, blur in zip(*flat, strict=True):
            yield _matrix(step, one, float(noise.norm()), x, float(blur.norm()), dual)


def _matrix(
    step: AppliedStep, direction: Tensor, error: float, u: Tensor, blur: float, scale: float
) -> _Matrix:
    group, rank = step.group, min(u.shape)
    values = torch.linalg.svdvals(u)
    if group["method"] == "svd":
        # Singular values that count as zero stay zero.
        tiny = 2 * max(u.shape) * torch.finfo(torch.float32).eps
        norm = values.amax()
        low, high, least = 1 - _SLACK, 1 + _SLACK, tiny
    else:
        chosen = coefficient_set(group["coefficients"])
        steps = group["ns_steps"]
        if steps is None and not isinstance(group["coefficients"], str):
            steps = max(5, len(group["coefficients"]))
        normalization = group["normalization"] or chosen.normalization
        low, high = polar_band(chosen.schedule(steps), chosen.margin)
        half = chosen.half_precision and _half(group, u)
        slack = _SLACK
        if half:
            tight = chosen.margin == 1 and normalization != "frobenius"
            slack = _SLACK_TIGHT if tight else _SLACK_HALF
        low, high, least = low - slack, high + slack, _LEAST_HALF if half else _LEAST
        if normalization == "aol":
            least = math.inf  # its rows are scaled first, so that u tells too little
            norm = values.amax()
        else:
            norm = torch.linalg.vector_norm(values, _POWERS[normalization]) * chosen.margin
    # Directions of u that may be its rounding are not counted.
    shares = (values - blur) / norm.clamp_min(1e-300)
    return _Matrix(direction, u * scale, error, shares, low, high, least, rank)


def _half(group: Group, u: Tensor) -> bool:
    """Return whether the products may have been in half precision."""
    dtype: Any = group["ns_dtype"]
    if dtype is not None:
        return dtype in (torch.bfloat16, torch.float16)
    return min(u.shape) >= (128 if u.device.type == "cpu" else 32)


def _input(step: AppliedStep) -> tuple[Tensor, Tensor]:
    """Return what was orthogonalized, from the gradient and the momentum after the step, and its rounding."""
    stored = step.state_after["momentum_buffer"]
    m, g, beta = stored.to(step.gradient.dtype), step.gradient, step.group["momentum"]
    if step.group["state_dtype"] == "int8":
        # A code is off by at most 1/127 of the largest in its block, or less.
        off = torch.full_like(m, float(m.abs().amax()) / 127)
    else:
        off = m.abs() * max(torch.finfo(stored.dtype).eps, torch.finfo(torch.float32).eps)
    return (g + beta * (m - g) if step.group["nesterov"] else m), off
