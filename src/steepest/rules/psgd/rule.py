"""PSGD: a Kronecker factored preconditioner, fitted online so that what it preconditions is white."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.linalg import spectral_norm_bound
from steepest.random import Key
from steepest.rule import Group, MatrixRule, Scalar, zeros
from steepest.rules.psgd.damping import damping_noise
from steepest.rules.psgd.options import PSGD_HYPER
from steepest.rules.psgd.schedule import fits_in, step_size
from steepest.rules.psgd.shapes import merged_shape, sides_of
from steepest.rules.psgd.sides import Side, chosen, second_moment, whitened
from steepest.rules.psgd.sizes import largest_magnitude, over, root_mean_square, unit

__all__ = ["PSGDRule"]

_CLIP = 1.1
_BALANCE_EVERY = 100
_LARGEST = 1e15  # of |A|: its square, summed, must be a float32


class PSGDRule(MatrixRule):
    """A = P_l (m + noise) P_r, Q fitted so that A is white;   p ← p − η·clip(P_l m P_r).

    What QUAD and Procrustes share; they differ in how Q moves and in what P is made of it. In the state
    a factor is Q/s, s the measured ``scale``: how Q moves depends on A alone, so s stays a number, and
    low precision keeps its range.
    """

    hyper = PSGD_HYPER
    counts_steps = True
    working_copies = 16

    @abstractmethod
    def metric(self, q: Tensor, *, literal: bool) -> Tensor:
        """P from a dense Q."""

    @abstractmethod
    def fit_dense(
        self, q: Tensor, step: Tensor, *, norm: Callable[[Tensor], Tensor] | None, key: Key
    ) -> Tensor:
        """Q after a step of S = (η/L)(T − cI), both [batch, s, s]."""

    @abstractmethod
    def fit_diagonal(self, q: Tensor, step: Tensor) -> Tensor:
        """q after a step of (η/L)(T − c), both [batch, s]."""

    # -- state

    def matrix_shape(self, shape: torch.Size, group: Group) -> tuple[int, ...]:
        """A vector, or the most square matrix."""
        return merged_shape(shape)

    def init_state(self, param: Tensor, group: Group) -> dict[str, Tensor]:
        """One momentum, as large as the parameter."""
        return {"momentum_buffer": zeros(param, group["state_dtype"])}

    def init_factors(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, group: Group
    ) -> dict[str, Tensor]:
        """For each side Q/s = I and L = 0; s, 0 until it is measured; and P, if it is not made each step.

        Only dense factors are as large as the algebra's dtype matters for.
        """
        stored = group["dtype"] or dtype
        precise = torch.promote_types(stored, torch.float32)
        factors = {"scale": torch.zeros((), dtype=precise, device=device)}
        for name, size in sides_of(shape, group["max_size_dense"], group["max_skew_dense"]).items():
            dense = len(size) == 2
            factors[f"Q{name}"] = (
                torch.eye(size[0], dtype=stored, device=device)
                if dense
                else torch.ones(size, dtype=precise, device=device)
            )
            factors[f"L{name}"] = torch.zeros((), dtype=precise, device=device)
            if dense and group["update_probability"] < 1:
                factors[f"P{name}"] = torch.eye(size[0], dtype=stored, device=device)
        return factors

    def derive_factors(self, kept: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
        """P, where it begins to be kept after the first step."""
        return {
            f"P{name.removeprefix('Q')}": self.metric(q.unsqueeze(0), literal=group["literal"])[0]
            for name, q in kept.items()
            if name.startswith("Q") and q.dim() == 2 and group["update_probability"] < 1
        }

    def stale_factors(self, group: Group) -> tuple[str, ...]:
        """P, where it is made in every step."""
        return () if group["update_probability"] < 1 else ("P_left", "P_right")

    def moves_like_adamw(self, group: Group) -> bool:
        """With ``lr_style="adam"``, which divides the update by 5."""
        return bool(group["lr_style"] == "adam")

    # -- the step

    def waits(self, group: Group) -> str | None:
        """A spectral norm by singular values."""
        return "norm='exact'" if group["norm"] == "exact" else None

    def relates(self, group: Group) -> str | None:
        """The original's Q starts from the largest gradient."""
        return "literal=True" if group["literal"] else None

    def relate(self, grads: Sequence[Tensor], group: Group) -> dict[str, Scalar]:
        """The largest mean square of the group's gradients, from which the original's Q starts."""
        if not group["literal"]:
            return {}
        norms = [(torch.linalg.vector_norm(g, dtype=torch.float64), g.numel()) for g in grads]
        squares = [norm.square() / numel for norm, numel in norms if numel > 0]
        return (
            {"largest_square": torch.stack([s.to(squares[0].device) for s in squares]).amax()}
            if squares
            else {}
        )

    def scalars(  # type: ignore[override]
        self,
        step: Scalar,
        *,
        preconditioner_lr: float,
        preconditioner_min_lr: float,
        update_probability: float,
        update_flat_steps: int,
        update_decay_steps: int,
        literal: bool,
        **hyper: Any,
    ) -> dict[str, Scalar]:
        """Q's step size in this step, and whether Q is fitted and its two factors balanced."""
        floor = preconditioner_min_lr if literal else min(preconditioner_min_lr, preconditioner_lr)
        return {
            "step_size": step_size(step, preconditioner_lr, floor),
            "fit": fits_in(step, update_probability, update_flat_steps, update_decay_steps),
            "balance": step % _BALANCE_EVERY == 0,
        }

    def update(  # type: ignore[override]
        self,
        grad: Tensor,
        param: Tensor,
        momentum_buffer: Tensor,
        scale: Tensor,
        *,
        momentum: Scalar,
        step_size: Scalar,
        fit: bool | Tensor,
        balance: bool | Tensor,
        key: Key,
        index: Callable[[], Tensor],
        grad_dtype: torch.dtype,
        largest_square: Tensor | None = None,
        **given: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``given`` holds the factors, by their names in the state, and the other hyper-parameters."""
        dtype = given["dtype"] or grad_dtype
        sides = self._sides(given, dtype)
        first = scale == 0
        average = (grad - momentum_buffer).mul_(1 - momentum).add_(momentum_buffer)
        # Where it needs no wait for a device, the question saves five passes in all steps but the first.
        on_host = scale.device.type == "cpu" and not isinstance(balance, Tensor)
        if not on_host or bool(first.any()):
            start = initial_scale(grad, len(sides), largest_square, given)
            scale = torch.where(first, start, scale)
            average = torch.where(over(first, grad), grad, average)
        if balance is not False and len(sides) == 2:
            sides, scale = self._balanced(sides, scale, balance)
        if fit is not False:
            target = grad if given["whiten"] == "gradient" else average
            fitted = self._fitted(sides, target, scale, step_size, dtype, key, index, given)
            if isinstance(fit, Tensor):
                fitted = [chosen(fit, new, old) for new, old in zip(fitted, sides, strict=True)]
            sides = fitted
        white, size = whitened(average, sides, dtype)
        white = white.to(grad.dtype)
        rms = root_mean_square(white)
        # min(f, 1.1/rms(W)) is f·1.1/max(rms(fW), 1.1), without the overflow.
        # A product beyond the largest number times a zero would be NaN.
        factor = torch.minimum(over(_gain(scale, sides), grad) * size, _CLIP / rms)
        u = white * factor.clamp(max=torch.finfo(factor.dtype).max)
        state = {"momentum_buffer": average, "scale": scale}
        for side in sides:
            state |= {f"Q{side.name}": side.q, f"L{side.name}": side.bound}
            if f"P{side.name}" in given:
                state[f"P{side.name}"] = side.p
        return u.div_(5) if given["lr_style"] == "adam" else u, state

    def _sides(self, given: Mapping[str, Any], dtype: torch.dtype) -> list[Side]:
        sides = []
        for name in ("", "_left", "_right"):
            if f"Q{name}" in given:
                q, p = given[f"Q{name}"], given.get(f"P{name}")
                if q.dim() == 3:
                    q = q.to(dtype)
                sides.append(
                    Side(
                        name,
                        q,
                        self._metric(q, given) if p is None else p.to(dtype),
                        given[f"L{name}"],
                    )
                )
        return sides

    def _metric(self, q: Tensor, given: Mapping[str, Any]) -> Tensor:
        return self.metric(q, literal=given["literal"]) if q.dim() == 3 else q * q

    def _balanced(
        self, sides: list[Side], scale: Tensor, balance: bool | Tensor
    ) -> tuple[list[Side], Tensor]:
        """Both factors with largest magnitude 1, the scale with their geometric mean: P stays."""
        balanced = []
        for side in sides:
            largest = side.q.abs().flatten(1).amax(1).to(scale.dtype)
            largest = torch.where((largest > 0) & torch.as_tensor(balance, device=scale.device), largest, 1.0)
            q = (side.q / over(largest, side.q)).to(side.q.dtype)
            p = (side.p / over(largest * largest, side.p)).to(side.p.dtype)
            balanced.append(Side(side.name, q, p, side.bound))
            scale = scale * largest.sqrt()
        return balanced, scale

    def _fitted(
        self,
        sides: list[Side],
        target: Tensor,
        scale: Tensor,
        step_size: Scalar,
        dtype: torch.dtype,
        key: Key,
        index: Callable[[], Tensor],
        given: Mapping[str, Any],
    ) -> list[Side]:
        """The sides after one step toward E[A Aᵀ] = cI of each, from one A = P_l (target + noise) P_r."""
        noise_scale = given["noise_scale"]
        # Of a matrix that is zero, or all but underflown, there is nothing to learn: Q would grow for ever.
        number = torch.finfo(target.dtype)
        largest = largest_magnitude(target).flatten()
        active = (scale > 0) & (largest > number.tiny / number.eps) & largest.isfinite()
        if noise_scale > 0:
            amount = torch.full_like(scale, noise_scale)
            if not given["literal"]:
                amount = amount + torch.finfo(dtype).eps * root_mean_square(target).flatten()
            noise = damping_noise(key, index, target.shape).to(target.dtype)
            target = target + over(amount, target) * noise
        a, size = whitened(target, sides, dtype)
        a, more = unit(a)
        factor = (over(_gain(scale, sides), target) * size * more).flatten().clamp(max=_LARGEST)
        first, second = key
        assert isinstance(first, Tensor)  # one key a matrix
        assert isinstance(second, Tensor)
        probes = (first.flatten(), second.flatten())
        fitted = []
        for side in sides:
            t = second_moment(a, side)
            c = a[0].numel() / side.size
            norm = _exact_norm if given["norm"] == "exact" else None
            if not side.dense:
                length = t.amax(-1)
            elif norm is None:
                length = spectral_norm_bound(t, key=probes).to(scale.dtype)
            else:
                length = norm(t.to(scale.dtype))
            length = factor * factor * length + c
            bound = torch.maximum(0.95 * side.bound + 0.05 * length, length)
            # Not step_size / bound: a float over a tensor and a tensor over a tensor round differently.
            pace = bound.reciprocal() * _as(bound, step_size)
            s = over(pace * factor * factor, t) * t.to(scale.dtype)
            if side.dense:
                s.diagonal(dim1=-2, dim2=-1).sub_((pace * c).unsqueeze(-1))
                q = self.fit_dense(side.q, s.to(dtype), norm=norm, key=probes)
            else:
                q = self.fit_diagonal(side.q, s - (pace * c).unsqueeze(-1))
            p, holds = self._metric(q, given), active
            if dtype == torch.float16:
                # Beyond what it can hold Q stays as it was, instead of being NaN for ever.
                holds = holds & q.flatten(1).isfinite().all(1) & p.flatten(1).isfinite().all(1)
            # Selected: what comes of a matrix without a number in it times 0 would be NaN.
            q, p = torch.where(over(holds, q), q, side.q), torch.where(over(holds, p), p, side.p)
            bound = torch.where(holds, bound, side.bound)
            fitted.append(Side(side.name, q, p, bound))
        return fitted


def initial_scale(
    grad: Tensor, factors: int, largest_square: Tensor | None, given: Mapping[str, Any]
) -> Tensor:
    """s, [batch], by which Q begins: A = s⁴ G is white for two factors, s² G for one. 0 for a zero gradient.

    The original takes ^(−1/4) of the group's largest mean square for every tensor, two factors or one.
    """
    rms = root_mean_square(grad).flatten()
    usable = (rms > 0) & rms.isfinite()
    rms = rms.clamp(min=torch.finfo(rms.dtype).tiny)  # whose inverse, the gain, is finite
    noise = torch.full_like(rms, given["noise_scale"])
    if given["preconditioner_init_scale"] is not None:
        start = torch.full_like(rms, given["preconditioner_init_scale"])
    elif largest_square is not None:
        start = torch.hypot(largest_square.sqrt().to(rms.dtype), noise) ** -0.5
    else:
        start = torch.hypot(rms, noise) ** (-0.25 if factors == 2 else -0.5)
    return torch.where(usable, start, 0.0)


def _as(like: Tensor, number: Scalar) -> Scalar:
    """A number, or one for each matrix, in the dtype of what it multiplies."""
    return number.to(like.dtype) if isinstance(number, Tensor) else number


def _gain(scale: Tensor, sides: list[Side]) -> Tensor:
    """What the factors' scales multiply P_l X P_r by: s⁴, or s² for one factor; 1 before s is measured."""
    power = scale * scale if len(sides) == 1 else (scale * scale) * (scale * scale)
    return torch.where(scale > 0, power, 1.0)


def _exact_norm(t: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(t, ord=2)
    return norm
