"""PSGD: a Kronecker factored preconditioner, fitted online so that what it preconditions is white."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from steepest.hyper import (
    Hyper,
    at_least,
    choice,
    flag,
    fraction,
    integer,
    learning_rate,
    optional,
    positive,
    rate,
)
from steepest.linalg import spectral_norm_bound
from steepest.options import CommonOptions
from steepest.random import Key, normal
from steepest.rule import Group, MatrixRule, Scalar, zeros
from steepest.views import View, fused_parameters

__all__ = ["PSGD_HYPER", "PSGDOptions", "PSGDRule", "Side", "fits_in", "merged_shape", "sides_of"]

_NOISE_STREAM = 3  # apart from the probes' 0 and 1
_CLIP = 1.1
_BALANCE_EVERY = 100
_LARGEST = 1e15  # of |A|: its square, summed, must be a float32


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


# What products, norms and traces are there for on every device.
_ALGEBRA = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

PSGD_HYPER: dict[str, Hyper] = {
    "lr": learning_rate(1e-3),
    "lr_style": choice("adam", "adam", None),
    "momentum": fraction(0.95),
    "weight_decay": at_least(0, 0.1),
    "max_size_dense": Hyper(16384, _is_size, "a number ≥ 0, infinity included"),
    "max_skew_dense": Hyper(1.0, _is_size, "a number ≥ 0, infinity included"),
    "preconditioner_lr": positive(0.7),
    "preconditioner_init_scale": optional(positive(1.0)),
    "noise_scale": at_least(0, 1e-9),
    "dtype": Hyper(
        None,
        lambda value: value is None or value in _ALGEBRA,
        f"None, {', '.join(map(str, _ALGEBRA[:-1]))} or {_ALGEBRA[-1]}",
    ),
    "preconditioner_min_lr": positive(0.3),
    "whiten": choice("momentum", "momentum", "gradient"),
    "update_probability": rate(1.0),
    "update_flat_steps": integer(1000, low=0),
    "update_decay_steps": integer(1000, low=0),
    "norm": choice("bound", "bound", "exact"),
    "literal": flag(False),
    "views": fused_parameters(),
    "bucket_bytes": integer(1 << 28, low=1),
}


class PSGDOptions(CommonOptions, total=False):
    """Keyword-only options of QUAD and Procrustes; their docstrings say what they mean."""

    preconditioner_min_lr: float
    whiten: Literal["momentum", "gradient"]
    update_probability: float
    update_flat_steps: int
    update_decay_steps: int
    norm: Literal["bound", "exact"]
    literal: bool
    views: Mapping[str, View] | None
    bucket_bytes: int


# -- shapes


def merged_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The vector (n,) or matrix (m, n) as which a tensor is preconditioned.

    A tensor whose largest dimension is all of it is a vector; three or more dimensions become the most
    square matrix that a contiguous split makes, the first one among equals.

    >>> merged_shape((128, 64, 3, 3)), merged_shape((1, 7, 1)), merged_shape(())
    ((128, 576), (7,), (1,))
    """
    numel = math.prod(shape)
    if len(shape) < 2 or numel == max(shape):
        return (numel,)
    splits = [(math.prod(shape[:at]), math.prod(shape[at:])) for at in range(1, len(shape))]
    return min(splits, key=lambda split: max(split) / max(min(split), 1))


def sides_of(
    shape: Sequence[int], max_size_dense: float, max_skew_dense: float
) -> dict[str, tuple[int, ...]]:
    """The factors of a merged shape: (s, s) for a dense one, (s,) for a diagonal one; "" is a vector's.

    A side of size s is diagonal if s > ``max_size_dense`` or s² > ``max_skew_dense``·numel.

    >>> sides_of((128, 1024), 16384, 1.0)
    {'_left': (128, 128), '_right': (1024,)}
    >>> sides_of((5,), 16384, 1.0)
    {'': (5,)}
    """
    if len(shape) == 1:
        return {"": (shape[0],)}
    numel = math.prod(shape)
    dense = [size <= max_size_dense and size * size <= max_skew_dense * numel for size in shape]
    return {
        name: (size, size) if whole else (size,)
        for name, size, whole in zip(("_left", "_right"), shape, dense, strict=True)
    }


@dataclass(frozen=True)
class Side:
    """One factor of a stack of matrices, with what it needs to act on them.

    ``q`` is [batch, s, s] or, diagonal, [batch, s]; ``p`` is the preconditioner made of it, in the dtype
    of the algebra; ``bound`` is L, [batch].
    """

    name: str
    q: Tensor
    p: Tensor
    bound: Tensor

    @property
    def dense(self) -> bool:
        """Whether the factor is a matrix."""
        return self.q.dim() == 3

    @property
    def size(self) -> int:
        """The dimension that it acts on."""
        return self.q.shape[-1]

    def along(self, x: Tensor) -> Tensor:
        """A diagonal factor's preconditioner, shaped to multiply x [batch, m, n], or [batch, n]."""
        return (
            self.p.unsqueeze(-1) if self.name == "_left" else self.p.view(-1, *[1] * (x.dim() - 2), self.size)
        )


# -- the schedule


def fits_in(step: Scalar, probability: float, flat: int, decay: int) -> bool | Tensor:
    """Whether Q is fitted in a step (from 1): whether the accumulated probability passes an integer.

    The probability is 1 for ``flat`` steps, then falls as exp(−τ/``decay``) to ``probability``, τ being
    the steps since. Its integral tells, so that no state and no random number is needed.

    >>> [step for step in range(1, 20) if fits_in(step, 0.25, 4, 0)]
    [1, 2, 3, 4, 8, 12, 16]
    """
    if probability == 1:
        return True

    def accumulated(t: Tensor) -> Tensor:
        # Beyond `flat`: ∫ exp(−τ/decay) until it meets `probability`, and a straight line from there.
        late = (t - flat).clamp(min=0)
        falling = late.clamp(max=-decay * math.log(probability))
        area = decay * -torch.expm1(-falling / max(decay, 1))
        whole = t.clamp(max=flat) + area + probability * (late - falling)
        return (whole + 1e-6).floor()  # an integer that rounding missed counts

    t = step if isinstance(step, Tensor) else torch.tensor(step, dtype=torch.float64, device="cpu")
    fits = accumulated(t) > accumulated(t - 1)
    return fits if isinstance(step, Tensor) else bool(fits)


# -- the rule


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

    # -- the step

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
        falling = preconditioner_lr / (1 + step / 10000) ** 0.5
        return {
            "step_size": falling.clamp(min=floor) if isinstance(falling, Tensor) else max(floor, falling),
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
        start = initial_scale(grad, len(sides), largest_square, given)
        scale = torch.where(first, start, scale)
        average = torch.where(
            _over(first, grad), grad, momentum_buffer + (1 - momentum) * (grad - momentum_buffer)
        )
        if balance is not False and len(sides) == 2:
            sides, scale = self._balanced(sides, scale, balance)
        if fit is not False:
            target = grad if given["whiten"] == "gradient" else average
            fitted = self._fitted(sides, target, scale, step_size, dtype, key, index, given)
            if isinstance(fit, Tensor):
                fitted = [_chosen(fit, new, old) for new, old in zip(fitted, sides, strict=True)]
            sides = fitted
        white, size = whitened(average, sides, dtype)
        white = white.to(grad.dtype)
        rms = _root_mean_square(white)
        # min(f, 1.1/rms(W)) is f·1.1/max(rms(fW), 1.1), without the overflow.
        # A product beyond the largest number times a zero would be NaN.
        factor = torch.minimum(_over(_gain(scale, sides), grad) * size, _CLIP / rms)
        u = white * factor.clamp(max=torch.finfo(factor.dtype).max)
        state = {"momentum_buffer": average, "scale": scale}
        for side in sides:
            state |= {f"Q{side.name}": side.q, f"L{side.name}": side.bound}
            if f"P{side.name}" in given:
                state[f"P{side.name}"] = side.p
        return u / 5 if given["lr_style"] == "adam" else u, state

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
            q = (side.q / _over(largest, side.q)).to(side.q.dtype)
            p = (side.p / _over(largest * largest, side.p)).to(side.p.dtype)
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
        largest = target.abs().flatten(1).amax(1)
        active = (scale > 0) & (largest > number.tiny / number.eps) & largest.isfinite()
        if noise_scale > 0:
            amount = torch.full_like(scale, noise_scale)
            if not given["literal"]:
                amount = amount + torch.finfo(dtype).eps * _root_mean_square(target).flatten()
            target = target + _over(amount, target) * normal(key, index(), _NOISE_STREAM).to(target.dtype)
        a, size = whitened(target, sides, dtype)
        a, more = unit(a)
        factor = (_over(_gain(scale, sides), target) * size * more).flatten().clamp(max=_LARGEST)
        first, second = key
        assert isinstance(first, Tensor)  # one key a matrix
        assert isinstance(second, Tensor)
        probes = (first.flatten(), second.flatten())
        fitted = []
        for side in sides:
            t = _second_moment(a, side)
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
            pace = bound.reciprocal() * step_size
            s = _over(pace * factor * factor, t) * t.to(scale.dtype)
            if side.dense:
                s.diagonal(dim1=-2, dim2=-1).sub_((pace * c).unsqueeze(-1))
                q = self.fit_dense(side.q, s.to(dtype), norm=norm, key=probes)
            else:
                q = self.fit_diagonal(side.q, s - (pace * c).unsqueeze(-1))
            # Selected: what comes of a matrix without a number in it times 0 would be NaN.
            q = torch.where(_over(active, q), q, side.q)
            bound = torch.where(active, bound, side.bound)
            fitted.append(Side(side.name, q, self._metric(q, given), bound))
        return fitted


def initial_scale(
    grad: Tensor, factors: int, largest_square: Tensor | None, given: Mapping[str, Any]
) -> Tensor:
    """s, [batch], by which Q begins: A = s⁴ G is white for two factors, s² G for one. 0 for a zero gradient.

    The original takes ^(−1/4) of the group's largest mean square for every tensor, two factors or one.
    """
    rms = _root_mean_square(grad).flatten()
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


def whitened(x: Tensor, sides: list[Side], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """P_l X P_r as (W, size), W times size: the dense factors multiply a unit-sized X in ``dtype``."""
    for side in sides:
        if not side.dense:
            x = x * side.along(x).to(x.dtype)
    x, size = unit(x)
    for side in sides:
        if side.dense:
            x = x.to(dtype)
            x = torch.bmm(side.p, x) if side.name == "_left" else torch.bmm(x, side.p)
    return x, size


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x over a power of two [batch, 1, ...] that brings its largest magnitude into [½, 1), and that power.

    So float16 meets no number that it cannot hold, and squares neither overflow nor underflow; the
    division is exact. Zero stays, with power 1; at the very ends of the range it is [¼, 4) or below.
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    largest = x.abs().amax(tuple(range(1, x.dim())), keepdim=True).to(precise)
    reach = math.frexp(torch.finfo(precise).max)[1] - 2  # the power and its inverse are normal numbers
    exponent = torch.frexp(largest).exponent.clamp(-reach, reach)
    power = torch.where(
        (largest > 0) & largest.isfinite(), torch.ldexp(torch.ones_like(largest), exponent), 1.0
    )
    return (x / power).to(x.dtype), power


def _second_moment(a: Tensor, side: Side) -> Tensor:
    """A Aᵀ or Aᵀ A of the stack, or the sums of A² over the other dimension for a diagonal side."""
    if side.dense:
        return torch.bmm(a, a.mT) if side.name == "_left" else torch.bmm(a.mT, a)
    square = a.to(side.q.dtype).square()
    return square if a.dim() == 2 else square.sum(-1 if side.name == "_left" else -2)


def _gain(scale: Tensor, sides: list[Side]) -> Tensor:
    """What the factors' scales multiply P_l X P_r by: s⁴, or s² for one factor; 1 before s is measured."""
    power = scale * scale if len(sides) == 1 else (scale * scale) * (scale * scale)
    return torch.where(scale > 0, power, 1.0)


def _chosen(fit: Tensor, new: Side, old: Side) -> Side:
    """One of two sides by a condition that only the device knows."""
    q, p, bound = (
        torch.where(fit.to(one.device), one, other)
        for one, other in ((new.q, old.q), (new.p, old.p), (new.bound, old.bound))
    )
    return Side(new.name, q, p, bound)


def _exact_norm(t: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(t, ord=2)
    return norm


def _over(values: Tensor, like: Tensor) -> Tensor:
    """[batch] shaped to act on [batch, ...]."""
    return values.view(-1, *_ones(like))


def _ones(x: Tensor) -> list[int]:
    """One for every dimension of [batch, ...] but the first."""
    return [1] * (x.dim() - 1)


def _root_mean_square(x: Tensor) -> Tensor:
    """Of each member of a stack, dimensions kept; of any size, squares that no float32 can hold included."""
    x, size = unit(x)
    return x.square().mean(tuple(range(1, x.dim())), keepdim=True).sqrt() * size
