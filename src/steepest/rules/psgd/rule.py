"""PSGD: a Kronecker factored preconditioner, fitted online so that what it preconditions is white."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.arithmetic import rms_clip_factor
from steepest.linalg import spectral_norm_bound
from steepest.random import Key
from steepest.rule import Group, Moments, Rule, Scalar, StateSpec
from steepest.rules.psgd.damping import damping_noise
from steepest.rules.psgd.options import PSGD_HYPER
from steepest.rules.psgd.schedule import fits_in, step_size
from steepest.rules.psgd.shapes import sides_of
from steepest.rules.psgd.sides import Side, chosen, second_moment, whitened
from steepest.rules.psgd.sizes import largest_magnitude, over, root_mean_square, unit
from steepest.views import merged_shape

__all__ = ["PSGDRule"]

_CLIP = 1.1
_BALANCE_EVERY = 100
_LARGEST = 1e15  # of |A|: its square, summed, must be a float32


class PSGDRule(Rule):
    """A = P_l (m + noise) P_r, Q fitted so that A is white;   p ← p − η·clip(P_l m P_r).

    What QUAD and Procrustes share; they differ in how Q moves and in what P is made of it. In the state
    a factor is Q/s, s the measured ``scale``: how Q moves depends on A alone, so s stays a number, and
    low precision keeps its range.
    """

    hyper = PSGD_HYPER
    counts_steps = True
    optional_state = frozenset({"P_left", "P_right"})
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

    def state_specs(self, group: Group) -> dict[str, StateSpec]:
        """One momentum, in ``dtype`` if that is set; float16 could not hold every gradient."""
        algebra = None if group["dtype"] == torch.float16 else group["dtype"]
        return {"momentum_buffer": StateSpec(dtype=group["state_dtype"] or algebra)}

    def matrix_specs(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, StateSpec]:
        """For each side Q/s = I and L = 0; s, 0 until it is measured; and P, if it is not made in each step.

        Only dense factors are so large that the algebra's dtype matters for them.
        """
        stored = group["dtype"] or dtype
        precise = torch.promote_types(stored, torch.float32)
        number = StateSpec("matrix", precise)
        specs = {"scale": number}
        for name, size in sides_of(shape, group["max_size_dense"], group["max_skew_dense"]).items():
            dense = len(size) == 2
            identity = StateSpec("matrix", stored, size, "identity")
            specs[f"Q{name}"] = identity if dense else StateSpec("matrix", precise, size, 1.0)
            specs[f"L{name}"] = number
            if dense and group["update_probability"] < 1:
                specs[f"P{name}"] = identity
        return specs

    def moves_like_adamw(self, group: Group) -> bool:
        """With ``lr_style="adam"``, which divides the update by 5."""
        return bool(group["lr_style"] == "adam")

    # -- the step

    def host_sync(self, group: Group) -> str | None:
        """A spectral norm by singular values."""
        return "norm='exact'" if group["norm"] == "exact" else None

    def relates(self, group: Group) -> str | None:
        """The original's Q starts from the largest gradient."""
        return "literal=True" if group["literal"] else None

    def needs_measure(self, group: Group) -> bool:
        """The original's start alone is made of a measured number."""
        return bool(group["literal"])

    def measure(
        self, moments: Callable[[], Moments], state: Mapping[str, Tensor], group: Group
    ) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
        """The gradient's mean square."""
        count, _, square = moments()
        return {"largest_square": square / max(count, 1)}, {}

    def relate(
        self, scalars: Sequence[dict[str, Scalar]], states: Sequence[Mapping[str, Any]], group: Group
    ) -> None:
        """The largest mean square of the group's gradients takes the place of each tensor's own."""
        squares: list[Any] = [own["largest_square"] for own in scalars]
        largest = torch.stack([square.to(squares[0].device) for square in squares]).amax()
        for own, square in zip(scalars, squares, strict=True):
            own["largest_square"] = largest.to(square.device)

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

    def transform_inputs(self, group: Group) -> int:
        """The momentum, and the gradient where that is whitened."""
        return 2 if group["whiten"] == "gradient" else 1

    def update(
        self,
        grad: Tensor,
        param: Tensor,
        momentum_buffer: Tensor,
        scale: Scalar,
        *,
        momentum: Scalar,
        whiten: str,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], dict[str, Tensor]]:
        """The average, which is the gradient itself until the scale has been measured."""
        average = momentum_buffer
        average += (grad - momentum_buffer).mul_(1 - momentum)
        if isinstance(scale, Tensor):
            average = torch.where(scale == 0, grad, average)
        elif scale == 0:
            average = grad
        return (average, grad) if whiten == "gradient" else average, {"momentum_buffer": average}

    def transform(
        self,
        u: Tensor,
        gradient: Tensor | None = None,
        *,
        scale: Tensor,
        step_size: Scalar,
        fit: bool | Tensor,
        balance: bool | Tensor,
        key: Key,
        index: Callable[[], Tensor],
        grad_dtype: torch.dtype,
        largest_square: Tensor | None = None,
        **given: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``given`` holds the factors, by their names in the state, and the other hyperparameters."""
        dtype = given["dtype"] or grad_dtype
        scale = scale.to(u.dtype)
        sides = self._sides(given, dtype, u.dtype)
        first = scale == 0
        # Where it needs no wait for a device, the question saves a pass in all steps but the first.
        on_host = scale.device.type == "cpu" and not isinstance(balance, Tensor)
        if not on_host or bool(first.any()):
            # Before the scale is measured the momentum is the gradient.
            scale = torch.where(first, initial_scale(u, len(sides), largest_square, given), scale)
        if balance is not False and len(sides) == 2:
            sides, scale = self._balanced(sides, scale, balance)
        if fit is not False:
            target = u if gradient is None else gradient
            fitted = self._fitted(sides, target, scale, step_size, dtype, key, index, given)
            if isinstance(fit, Tensor):
                fitted = [chosen(fit, new, old) for new, old in zip(fitted, sides, strict=True)]
            sides = fitted
        white, size = whitened(u, sides, dtype)
        white = white.to(u.dtype)
        # min(f, 1.1/rms(W)) is f·1.1/max(rms(fW), 1.1), without the overflow.
        factor = rms_clip_factor(over(_gain(scale, sides), u) * size, root_mean_square(white), _CLIP)
        direction = white * factor
        state = {"scale": scale}
        for side in sides:
            state |= {f"Q{side.name}": side.q, f"L{side.name}": side.bound}
            if f"P{side.name}" in given:
                state[f"P{side.name}"] = side.p
        return direction.div_(5) if given["lr_style"] == "adam" else direction, state

    def _sides(self, given: Mapping[str, Any], dtype: torch.dtype, wide: torch.dtype) -> list[Side]:
        sides = []
        for name in ("", "_left", "_right"):
            if f"Q{name}" in given:
                q, p = given[f"Q{name}"], given.get(f"P{name}")
                q = q.to(dtype if q.dim() == 3 else wide)
                p = self._metric(q, given) if p is None else p.to(dtype)
                sides.append(Side(name, q, p, given[f"L{name}"].to(wide)))
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
