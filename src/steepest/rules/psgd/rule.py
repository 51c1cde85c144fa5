"""PSGD: a Kronecker-factored preconditioner, fitted online so that its output is white."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.arithmetic import average_in_place, rms_clip_factor
from steepest.constructor import constructor
from steepest.hyperparameters import (
    Hyperparameter,
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
from steepest.optimizer import Optimizer
from steepest.rule import Group, MatrixOptions, Moments, Rule, Scalar, StateSpec
from steepest.rules.psgd.factors import (
    Side,
    balanced,
    damping_noise,
    largest_magnitude,
    over,
    root_mean_square,
    second_moment,
    sides_of,
    unit,
    whitened,
)
from steepest.views import merged_shape

__all__ = ["PSGD", "PSGDRule", "fits_in"]

_SIZE = at_least(0)
_CLIP = 1.1
_BALANCE_EVERY = 100
_LARGEST = 1e15  # of |A|: sums of its squares must fit in float32


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


class PSGDRule(Rule):
    """A = P_l (m + noise) P_r, Q fitted so that A is white;   p ← p − η·clip(P_l m P_r).

    The state holds Q/s, with s the measured ``scale``: Q's motion depends only on A, so s can stay one
    number, and Q stays in the range of low precision.
    """

    hyper = {
        "lr": learning_rate(),
        "lr_style": choice("adam", None),
        "momentum": fraction(),
        "weight_decay": at_least(0),
        "max_size_dense": Hyperparameter(_is_size, "a number ≥ 0, infinity included"),
        "max_skew_dense": Hyperparameter(_is_size, "a number ≥ 0, infinity included", traced=True),
        "preconditioner_lr": positive(),
        "preconditioner_init_scale": optional(positive()),
        "noise_scale": at_least(0),
        "dtype": choice(None, torch.bfloat16, torch.float16, torch.float32, torch.float64),
        "preconditioner_min_lr": positive(),
        "whiten": choice("momentum", "gradient"),
        "update_probability": rate(),
        "update_flat_steps": integer(low=0),
        "update_decay_steps": integer(low=0),
        "norm": choice("bound", "exact"),
        "literal": flag(),
    }
    counts_steps = True
    optional_state = frozenset({"P_left", "P_right"})
    working_copies = 16

    @abstractmethod
    def metric(self, q: Tensor, *, literal: bool) -> Tensor:
        """Compute P from a dense Q."""

    @abstractmethod
    def fit_dense(self, q: Tensor, step: Tensor, **norm: Any) -> Tensor:
        """Return Q after a step of S = (η/L)(T − cI), both [batch, s, s]; ``norm`` chooses its norm."""

    @abstractmethod
    def fit_diagonal(self, q: Tensor, step: Tensor) -> Tensor:
        """Return q after a step of (η/L)(T − c), both [batch, s]."""

    # -- state

    def compute_dtype(self, group: Group) -> torch.dtype | None:
        dtype: torch.dtype | None = group["dtype"]
        return dtype

    def matrix_shape(self, shape: torch.Size, group: Group) -> tuple[int, ...]:
        return merged_shape(shape)

    def state_specs(self, group: Group) -> dict[str, StateSpec]:
        """Return the momentum, in ``dtype`` if set, except float16, which could not hold every gradient."""
        algebra = None if group["dtype"] == torch.float16 else group["dtype"]
        dtype = None if group["state_dtype"] else algebra
        return {"momentum_buffer": StateSpec(dtype=dtype, range="signed", beta=group["momentum"])}

    def matrix_specs(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, StateSpec]:
        """Return Q/s = I and L = 0 of each side; s, 0 until measured; and P, if it is kept between steps."""
        stored = group["dtype"] or dtype
        precise = torch.promote_types(stored, torch.float32)
        number = StateSpec("matrix", precise, numbers=_SIZE)
        specs = {"scale": number}
        for name, size in sides_of(shape, group["max_size_dense"], group["max_skew_dense"]).items():
            dense = len(size) == 2
            identity = StateSpec("matrix", stored, size, "identity")
            specs[f"Q{name}"] = identity if dense else StateSpec("matrix", precise, size, 1.0)
            specs[f"L{name}"] = number
            if dense and group["update_probability"] < 1:
                specs[f"P{name}"] = identity
        return specs

    def cost(self, shape: tuple[int, ...], group: Group) -> float:
        """Return the flops of the products with dense factors, in a step that fits them."""
        numel = math.prod(shape)
        sides = sides_of(shape, group["max_size_dense"], group["max_skew_dense"]).values()
        return 16.0 * numel + sum(6.0 * (numel + size[0] ** 2) * size[0] for size in sides if len(size) == 2)

    def moves_like_adamw(self, group: Group) -> bool:
        """Return whether ``lr_style="adam"`` divides the update by 5."""
        return bool(group["lr_style"] == "adam")

    # -- the step

    def host_sync(self, group: Group) -> str | None:
        return "norm='exact'" if group["norm"] == "exact" else None

    def relates(self, group: Group) -> str | None:
        """Return ``literal``, if set: the original's Q starts from the largest gradient."""
        return "literal=True" if group["literal"] else None

    def needs_measure(self, group: Group) -> bool:
        """Return ``literal``: only the original's start needs a measured number."""
        return bool(group["literal"])

    def measure(
        self, moments: Moments | None, state: Mapping[str, Tensor], group: Group
    ) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
        assert moments is not None
        return {"largest_square": moments.square / max(moments.numel, 1)}, {}

    def relate(
        self, scalars: Sequence[dict[str, Scalar]], states: Sequence[Mapping[str, Any]], group: Group
    ) -> None:
        """Replace each tensor's mean square by the largest one of the group."""
        squares: list[Any] = [own["largest_square"] for own in scalars]
        largest = torch.stack([square.to(squares[0].device) for square in squares]).amax()
        for own, square in zip(scalars, squares, strict=True):
            own["largest_square"] = largest.to(square.device)

    def scalars(self, step: Scalar, **hyper: Any) -> dict[str, Scalar]:
        """Return Q's step size, and whether this step fits Q and balances its two factors."""
        start, floor = hyper["preconditioner_lr"], hyper["preconditioner_min_lr"]
        size = start / (1 + step / 10000) ** 0.5
        floor = floor if hyper["literal"] else min(floor, start)
        schedule = (hyper[f"update_{name}"] for name in ("probability", "flat_steps", "decay_steps"))
        return {
            "step_size": size.clamp(min=floor) if isinstance(size, Tensor) else max(floor, size),
            "fit": fits_in(step, *schedule),
            "balance": step % _BALANCE_EVERY == 0,
        }

    def transform_inputs(self, group: Group) -> int:
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
        """Return the average, which is the gradient itself until the scale has been measured."""
        average = average_in_place(momentum_buffer, momentum, grad)
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
        key: tuple[Tensor, Tensor],
        index: Callable[[], Tensor],
        grad_dtype: torch.dtype,
        largest_square: Tensor | None = None,
        **given: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Fit Q and precondition u; ``given`` holds the factors by name and the other hyperparameters."""
        dtype = given["dtype"] or grad_dtype
        scale = scale.to(u.dtype)
        sides = self._sides(given, dtype, u.dtype)
        # Tested on the CPU only, since a device would have to be waited for; until then u is the gradient.
        if isinstance(balance, Tensor) or not scale.is_cpu or bool((scale == 0).any()):
            scale = torch.where(scale == 0, _initial_scale(u, len(sides), largest_square, given), scale)
        if balance is not False and len(sides) == 2:
            sides, scale = balanced(sides, scale, balance)
        if fit is not False:
            target = u if gradient is None else gradient
            sides = self._fitted(sides, target, scale, step_size, fit, dtype, key, index, given)
        white, size = whitened(u, sides, dtype, _gain(scale, sides), donated=True)
        white = white.to(u.dtype)
        # min(f, 1.1/rms(W)) is f·1.1/max(rms(fW), 1.1), without the overflow.
        factor = rms_clip_factor(size, root_mean_square(white), _CLIP)
        direction = white.mul_(factor)
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

    def _fitted(
        self,
        sides: list[Side],
        target: Tensor,
        scale: Tensor,
        step_size: Scalar,
        fit: bool | Tensor,
        dtype: torch.dtype,
        key: tuple[Tensor, Tensor],
        index: Callable[[], Tensor],
        given: Mapping[str, Any],
    ) -> list[Side]:
        """Return the sides after one step toward E[A Aᵀ] = cI each, from one A = P_l (target + noise) P_r."""
        noise_scale = given["noise_scale"]
        # A zero or nearly underflowed matrix would make Q grow forever.
        number = torch.finfo(target.dtype)
        largest = largest_magnitude(target).flatten()
        active = (scale > 0) & (largest > number.tiny / number.eps) & largest.isfinite()
        if isinstance(fit, Tensor):
            active = active & fit.to(active.device)
        gain = _gain(scale, sides)
        if noise_scale > 0:
            # Of unit size, because noise on the largest number would overflow.
            target, power = unit(target)
            amount = noise_scale / power.flatten()
            if not given["literal"]:
                amount = amount + torch.finfo(dtype).eps * root_mean_square(target).flatten()
            noise = damping_noise(key, index, target.shape).to(target.dtype)
            target.addcmul_(over(amount, target), noise)
            gain = gain * power.flatten()
        a, size = whitened(target, sides, dtype, gain, donated=noise_scale > 0)
        a, more = unit(a, donated=True)
        factor = (size * more).flatten().clamp(max=_LARGEST)
        probes = (key[0].flatten(), key[1].flatten())
        norm = partial(torch.linalg.matrix_norm, ord=2) if given["norm"] == "exact" else None
        if isinstance(step_size, Tensor):
            step_size = step_size.to(scale.dtype)
        fitted = []
        for side in sides:
            t = second_moment(a, side)
            c = a[0].numel() / side.q.shape[-1]
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
            s = over(pace * factor * factor, t) * t.to(scale.dtype)
            if side.dense:
                s.diagonal(dim1=-2, dim2=-1).sub_((pace * c).unsqueeze(-1))
                q = self.fit_dense(side.q, s.to(dtype), norm=norm, key=probes)
            else:
                q = self.fit_diagonal(side.q, s - (pace * c).unsqueeze(-1))
            p, holds = self._metric(q, given), active
            if dtype == torch.float16:
                # A Q that overflows stays as it was, instead of being NaN forever.
                holds = holds & q.flatten(1).isfinite().all(1) & p.flatten(1).isfinite().all(1)
            # Select instead of multiplying by 0, which would keep the NaN of a non-finite matrix.
            q, p = torch.where(over(holds, q), q, side.q), torch.where(over(holds, p), p, side.p)
            fitted.append(Side(side.name, q, p, torch.where(holds, bound, side.bound)))
        return fitted


def _initial_scale(
    grad: Tensor, factors: int, largest_square: Tensor | None, given: Mapping[str, Any]
) -> Tensor:
    """Return the first s [batch]: A = s⁴ G is white for two factors, s² G for one; 0 for G = 0."""
    rms = root_mean_square(grad).flatten()
    usable = (rms > 0) & rms.isfinite()
    rms = rms.clamp(min=torch.finfo(rms.dtype).tiny)  # the gain, its inverse, must be finite
    noise = torch.full_like(rms, given["noise_scale"])
    if given["preconditioner_init_scale"] is not None:
        start = torch.full_like(rms, given["preconditioner_init_scale"])
    elif largest_square is not None:  # the original's, for two factors or one
        start = torch.hypot(largest_square.sqrt().to(rms.dtype), noise) ** -0.5
    else:
        start = torch.hypot(rms, noise) ** (-0.25 if factors == 2 else -0.5)
    return torch.where(usable, start, 0.0)


def _gain(scale: Tensor, sides: list[Side]) -> Tensor:
    """Return the scales' factor on P_l X P_r: s⁴, or s² for one factor; 1 before s is measured."""
    power = scale * scale if len(sides) == 1 else (scale * scale) * (scale * scale)
    return torch.where(scale > 0, power, 1.0)


def fits_in(step: Scalar, probability: float, flat: int, decay: int) -> bool | Tensor:
    """Return whether a step (from 1) fits Q: whether the probability's integral passes an integer.

    The probability is 1 for ``flat`` steps; τ steps later it is exp(−τ/``decay``), at least ``probability``.

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
        return (whole + 1e-6).floor()  # counts an integer missed by rounding

    t = step if isinstance(step, Tensor) else torch.tensor(step, dtype=torch.float64, device="cpu")
    fits = accumulated(t) > accumulated(t - 1)
    return fits if isinstance(step, Tensor) else bool(fits)


class PSGD(Optimizer):
    r"""PSGD with Kronecker factors, the base of :class:`~steepest.QUAD` and :class:`~steepest.Procrustes`.

    .. math::
        m \leftarrow \beta m + (1-\beta) g, \quad
        A = P_l\,(m + \text{noise})\,P_r, \quad
        T = A A^\top, \quad
        Q_l \leftarrow \mathrm{fit}(Q_l, T), \quad P_l = Q_l^\top Q_l

    .. math::
        u = P_l\, m\, P_r, \quad u \leftarrow \frac{1.1\,u}{\max(\mathrm{rms}(u),\, 1.1)}, \quad
        p \leftarrow p - \eta\lambda p - \eta\, u / 5

    for an m×n matrix, and likewise from the right with :math:`T = A^\top A`; m = g in the first step. The
    subclasses differ in fit, a step of size μ/L along T − cI: c is numel/size of the side, so that A tends to
    have unit covariance; L is the largest recent :math:`\lVert T\rVert_2 + c` (it rises at once and falls by
    5 % a step); μ = max(0.3, μ₀/√(1 + t/10000)), at most μ₀ = ``preconditioner_lr``. A diagonal factor takes
    the row or column sums of A² for T.

    **Shapes.** Three or more dimensions are merged into the most square matrix, (128, 64, 3, 3) into
    128×576; 0-D and 1-D parameters, and matrices of one row or column, have one diagonal factor. Parameters
    of one shape are stacked.

    **Start.** Q = s·I with :math:`s = (\mathrm{mean}\,g^2 + \text{noise}^2)^{-1/8}` for two factors and
    ^(−1/4) for one, of each tensor's first gradient that is not zero, so that its first update is already
    white. Q does not move while a gradient is zero or s is not measured.

    State: ``momentum_buffer``, of the parameter's shape in ``state_dtype``, and for each matrix ``Q_left``
    and ``Q_right`` (for a vector ``Q``): m² or m and n² or n numbers, dense ones in ``dtype``, diagonal ones
    in float32 at least; three numbers, ``L_left``, ``L_right`` and ``scale``; with ``update_probability`` < 1
    as many numbers again as the dense Q have. In float32 with two dense factors that is 4 (mn + m² + n²) + 12
    bytes, and ``step`` for each parameter. Q is kept divided by ``scale``.

    Args:
        params: tensors of any shape, ``(name, tensor)`` pairs, or group dicts.
        lr: learning rate η ≥ 0, a float or a 1-element tensor.
        lr_style: ``"adam"`` divides u by 5, to updates as large as AdamW's: rms 0.19 to 0.2 for matrices
            with a diagonal side, 0.17 for square ones on pure noise (docs/psgd.md has why). The best
            learning rate may still be another: 0.009 to 0.014 for the small GPT of docs/which-optimizer.md,
            where AdamW's is 0.0018. None takes u, of rms near 1, as it is.
        momentum: β in [0, 1).
        weight_decay: λ ≥ 0, acting as ``weight_decay_method`` says, with the undivided lr.
        max_size_dense: larger sides have diagonal factors, smaller ones dense factors.
        max_skew_dense: sides of size s with s² > this·numel have diagonal factors: none with ``math.inf``.
        preconditioner_lr: μ₀ > 0.
        preconditioner_init_scale: s > 0; None measures it, as above.
        noise_scale: damping. Where Q is fitted, (``noise_scale`` + ε rms(m))·N(0, 1) is added to m, with ε
            the machine epsilon of ``dtype``, so that rows without a gradient stay within its range. A
            matrix's noise is Hankel: m+n−1 draws with the second moments of mn. 0 adds
            nothing at all: the factor of a row or column that is always zero then grows without bound, and
            after some hundred steps the rest of the update vanishes beside it.
        dtype: of the products, and of dense Q; None takes the gradient's, and the parameter's for Q.
            Traces, bounds and diagonal factors are in float32 at least.
        preconditioner_min_lr: the lower bound 0.3 of μ.
        whiten: fit Q to the ``"momentum"`` or to the ``"gradient"``; u is P_l m P_r in either case.
        update_probability: Q is fitted in each of the first ``update_flat_steps`` steps; then the
            probability falls as exp(−τ/``update_decay_steps``), τ steps later, to this one (0.03 for long
            runs). Q is fitted when their sum passes an integer, so nothing is random; P is kept in between.
        update_flat_steps: how many steps fit Q before the probability falls.
        update_decay_steps: how slowly it falls; 0 for at once.
        norm: compute ‖T‖₂ by ``"bound"``, from below by power iteration
            (:func:`steepest.linalg.spectral_norm_bound`), or ``"exact"``: slow; an oracle.
        literal: follow the original's code: s is the same for all tensors of a group, ^(−1/4) of their
            largest mean g²; noise without ε; μ ≥ 0.3 whatever μ₀.
        **options: ``views`` of fused parameters, each block preconditioned by itself, and
            ``bucket_bytes`` (:class:`~steepest.rule.MatrixOptions`); :class:`~steepest.CommonOptions`.

    Raises:
        TypeError: an unknown keyword, or parameters that are not tensors.
        ValueError: a value out of range; a view that does not fit its parameter, by name.

    Source: X.-L. Li, "Stochastic Hessian Fittings with Lie Groups", arXiv 2402.11858 (2024), and
    arXiv 2402.04553 (2024), 1512.04202 (2015), 1809.10232 (2018), 2211.04422 (2022); the class and its
    arguments are quad_torch's.
    """

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        lr_style: Literal["adam"] | None = "adam",
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        max_size_dense: float = 16384,
        max_skew_dense: float = 1.0,
        preconditioner_lr: float = 0.7,
        preconditioner_init_scale: float | None = None,
        noise_scale: float = 1e-9,
        dtype: torch.dtype | None = None,
        *,
        preconditioner_min_lr: float = 0.3,
        whiten: Literal["momentum", "gradient"] = "momentum",
        update_probability: float = 1.0,
        update_flat_steps: int = 1000,
        update_decay_steps: int = 1000,
        norm: Literal["bound", "exact"] = "bound",
        literal: bool = False,
        **options: Unpack[MatrixOptions],
    ) -> None: ...
