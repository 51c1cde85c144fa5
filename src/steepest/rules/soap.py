"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.arithmetic import average_in_place, exact_sqrt, weighted_sum
from steepest.constructor import constructor
from steepest.hyperparameters import at_least, betas, fraction, integer, learning_rate, optional
from steepest.linalg import gram
from steepest.linalg.product import product
from steepest.optimizer import Optimizer
from steepest.rule import Group, MatrixOptions, Rule, Scalar, StateSpec
from steepest.views import merged_shape

__all__ = ["SOAP", "SOAPRule"]

_SIDES = ("left", "right")
_DOWN = 2.0**-16  # ‖G‖_F is at most √numel times the largest number


class SOAPRule(Rule):
    """m ← β₁m + (1−β₁)G,  v ← β₂v + (1−β₂)(Q_Lᵀ G Q_R)²,  p ← p − η·Q_L [Q_Lᵀ m̂ Q_R / (√v̂ + ε)] Q_Rᵀ."""

    name = "soap"
    hyper = {
        "lr": learning_rate(),
        "betas": betas(2),
        "shampoo_beta": optional(fraction()),
        "eps": at_least(0),
        "weight_decay": at_least(0),
        "precondition_frequency": integer(low=1),
        "max_precond_dim": integer(low=0),
    }
    counts_steps = True

    def moves_like_adamw(self, group: Group) -> bool:
        """Return True: it is Adam's update, and a rotation keeps the rms."""
        return True

    def host_sync(self, group: Group) -> str | None:
        """Return the check whether bases are due in a step; eigh waits as well."""
        return "the choice of the steps that renew the eigenbases"

    def matrix_shape(self, shape: torch.Size, group: Group) -> tuple[int, ...]:
        return merged_shape(shape)

    def state_specs(self, group: Group) -> dict[str, StateSpec]:
        return {"exp_avg": StateSpec(range="signed", beta=group["betas"][0])}

    def matrix_specs(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, StateSpec]:
        """Return the second moment in the eigenbases, and L or R and its basis for each rotated side."""
        precise = torch.promote_types(dtype, torch.float32)
        specs = {"exp_avg_sq": StateSpec("matrix", precise, shape)}
        for side, size in zip(_SIDES, shape, strict=False):
            if len(shape) == 2 and size <= group["max_precond_dim"]:
                specs[f"GG_{side}"] = StateSpec("matrix", precise, (size, size))
                specs[f"Q_{side}"] = StateSpec("matrix", precise, (size, size), "identity")
        return specs

    def cost(self, shape: tuple[int, ...], group: Group) -> float:
        """Return the flops of the rotations, and of L and R."""
        numel, most = math.prod(shape), group["max_precond_dim"]
        return 16.0 * numel + sum(8.0 * numel * size for size in shape if len(shape) == 2 and size <= most)

    def scalars(self, step: Scalar, **hyper: Any) -> dict[str, Scalar]:
        """Count steps from the second one, which is the first that moves the parameter."""
        beta1, beta2 = hyper["betas"]
        moved = step - 1
        counted = moved.clamp(min=1) if isinstance(moved, Tensor) else max(moved, 1)
        return {
            "take": (1 - beta1) * (moved > 0),
            "first": moved == 0,
            "renew": (moved > 0) & (moved % hyper["precondition_frequency"] == 0),
            "correction1": 1 / (1 - beta1**counted),
            "correction2": 1 / (1 - beta2**counted),
        }

    def transform_inputs(self, group: Group) -> int:
        return 2

    def update(
        self, grad: Tensor, param: Tensor, exp_avg: Tensor, *, betas: tuple[Any, Any], take: Scalar
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        """Return the momentum, which leaves out the first gradient, and the gradient."""
        average = average_in_place(exp_avg, betas[0], grad, take)
        return (average, grad), {"exp_avg": average}

    def transform(
        self,
        u: Tensor,
        gradient: Tensor,
        *,
        exp_avg_sq: Tensor,
        GG_left: Tensor | None = None,
        GG_right: Tensor | None = None,
        Q_left: Tensor | None = None,
        Q_right: Tensor | None = None,
        first: bool | Tensor,
        renew: bool | Tensor,
        correction1: Scalar,
        correction2: Scalar,
        betas: tuple[Any, Any],
        shampoo_beta: float | None,
        eps: Scalar,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run Adam between two rotations, then update L, R and their bases with this gradient.

        The bases must be older than the gradient: in its own bases it would be diagonal, and the rest of
        Adam's update would be rounding errors of magnitude 1.
        """
        beta2 = betas[1]
        bases = [None if q is None else q.to(u.dtype) for q in (Q_left, Q_right)]
        # Sums of numbers near the largest one would be ∞ − ∞. Scaling by a power of two rounds nothing.
        turned = _rotated(gradient * _DOWN, *bases)
        turned /= _DOWN
        second = weighted_sum(beta2, exp_avg_sq.to(u.dtype), 1 - beta2, turned * turned)
        denominator = exact_sqrt(second * _each(correction2, u))
        denominator += eps
        direction = _rotated(u * _DOWN, *bases) * _each(correction1, u)
        direction /= denominator
        direction /= _DOWN
        direction = _rotated(direction, *(None if q is None else q.mT for q in bases))
        direction = _chosen(first, torch.zeros_like(direction), direction)
        second = _chosen(first, exp_avg_sq.to(u.dtype), second)
        state: dict[str, Tensor] = {}
        beta = beta2 if shampoo_beta is None else shampoo_beta
        for at, (moment, q) in enumerate(zip((GG_left, GG_right), bases, strict=True)):
            if moment is None or q is None:
                continue
            before, square = moment.to(u.dtype), gram(gradient if at == 0 else gradient.mT)
            moment = weighted_sum(beta, before, 1 - beta, square)
            moment = _chosen(moment.flatten(1).isfinite().all(1), moment, before)
            if _any(renew):
                q, second = _renewed(renew, moment, q, second, at)
            if _any(first):
                q = _chosen(first, _eigenbasis(moment), q)
            state |= {f"GG_{_SIDES[at]}": moment, f"Q_{_SIDES[at]}": q}
        return direction, {"exp_avg_sq": second, **state}


def _rotated(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return Q_Lᵀ X Q_R; None is the identity."""
    if left is not None:
        x = product(left.mT, x)
    if right is not None:
        x = product(x, right)
    return x


def _eigenbasis(moment: Tensor) -> Tensor:
    """Return eigenvectors, largest eigenvalue first; I for non-finite matrices, on which eigh fails."""
    usable = moment.flatten(1).isfinite().all(1).view(-1, 1, 1)
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    vectors: Tensor = torch.linalg.eigh(torch.where(usable, moment, identity)).eigenvectors
    return vectors.flip(-1)


def _renewed(
    renew: bool | Tensor, moment: Tensor, q: Tensor, second: Tensor, side: int
) -> tuple[Tensor, Tensor]:
    """Return the basis after one power iteration, and the second moments in the order of its columns."""
    # Columns are ordered by their estimated eigenvalues first, so that QR takes the large ones as they are.
    image = product(moment, q)
    order = (q * image).sum(-2).argsort(stable=True, dim=-1, descending=True)
    image = image.gather(-1, order.unsqueeze(-2).expand_as(image))
    fresh = torch.linalg.qr(image).Q
    # A non-finite L gives no basis.
    holds = fresh.flatten(1).isfinite().all(1) & renew
    index = order.unsqueeze(-1) if side == 0 else order.unsqueeze(-2)
    sorted_second = second.gather(-2 + side, index.expand_as(second))
    return _chosen(holds, fresh, q), _chosen(holds, sorted_second, second)


def _each(number: Scalar, like: Tensor) -> Scalar:
    """Reshape a number, or one for each matrix of a stack, to multiply the stack."""
    if not isinstance(number, Tensor):
        return number
    return number.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _any(condition: bool | Tensor) -> bool:
    return bool(condition.any()) if isinstance(condition, Tensor) else condition


def _chosen(condition: bool | Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Choose one of two stacks, matrix by matrix if the condition is a tensor."""
    if not isinstance(condition, Tensor):
        return one if condition else other
    return torch.where(condition.view(-1, *[1] * (one.dim() - 1)), one, other)


class SOAP(Optimizer, rule=SOAPRule()):
    r"""Adam, run in the eigenbases of Shampoo's preconditioner L ⊗ R, which change slowly.

    .. math::
        m \leftarrow \beta_1 m + (1-\beta_1) G, \quad
        G' = Q_L^\top G\, Q_R, \quad
        v \leftarrow \beta_2 v + (1-\beta_2)\, G' \odot G'

    .. math::
        p \leftarrow p - \eta\lambda p - \eta\, Q_L \left[
        \frac{Q_L^\top m\, Q_R / (1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)}+\epsilon} \right] Q_R^\top

    .. math::
        L \leftarrow \beta L + (1-\beta)\, G G^\top, \quad
        R \leftarrow \beta R + (1-\beta)\, G^\top G, \quad
        Q_L \leftarrow \mathrm{QR}(L\, Q_L), \quad Q_R \leftarrow \mathrm{QR}(R\, Q_R)

    The bases are renewed every ``precondition_frequency`` steps. **A parameter's first step** makes them, by
    eigh of its first gradient, and moves it by the weight decay alone, as the authors' code does: in its own
    basis that gradient is diagonal, and the rest of Adam's update would be rounding errors. It does not
    count: t, m and v begin with the second step.

    **Shapes.** Three or more dimensions are merged into the most square matrix, (128, 64, 3, 3) into
    128×576. A side larger than ``max_precond_dim`` is not rotated. 0-D and 1-D parameters, and matrices of
    one row or column, are stepped by Adam. Parameters of one shape are stacked.

    A float32 gradient above 1.8e19 has no finite square: it makes the second moment infinite where it
    lies in the eigenbases, which then never move again, apart from weight decay, and ``nonfinite`` does
    not look for it. L and R leave it out.

    State: ``exp_avg``, of the parameter's shape in ``state_dtype``; in float32 at least, ``exp_avg_sq`` and,
    for each rotated side of size s, ``GG_left`` and ``Q_left`` (``_right``), 2·s² numbers. Float32 bytes of
    an m×n matrix: 8 (mn + m² + n²); and one step count per tensor.

    Args:
        params: tensors of any shape, ``(name, tensor)`` pairs, or group dicts.
        lr: learning rate η ≥ 0, a float or a 1-element tensor.
        betas: β₁ and β₂ of the two averages, each in [0, 1).
        shampoo_beta: β in [0, 1) of L and R; None takes β₂.
        eps: ε ≥ 0, added to the corrected root (the authors' code adds it before the correction).
        weight_decay: λ ≥ 0, acting as ``weight_decay_method`` says.
        precondition_frequency: how many steps apart the bases are renewed; 1 is exact and slow.
        max_precond_dim: the largest side that is rotated; with 0 this is Adam.
        **options: :class:`~steepest.rule.MatrixOptions` and :class:`~steepest.CommonOptions`. With
            ``capturable``, or with ``nonfinite="skip"`` on an accelerator, each step waits for the device,
            which alone knows whether bases are due; no CUDA graph can capture it.

    Raises:
        TypeError: an unknown keyword, or parameters that are not tensors.
        ValueError: a value out of range; a view that does not fit its parameter, by name.

    Tuning:
        - ``lr``: 3e-3 is the authors'. Measured here: 5.6 times AdamW's on a small GPT, 0.57 times on digits
          (docs/learning_rates.md).
        - ``weight_decay``: keep lr·λ.
        - ``betas``, ``precondition_frequency``: (0.95, 0.95) and 10 are the authors'.
        - batch size: the authors train with large ones. Measured here: with 16 times the batch and as many
          steps the best lr is 0.32 times as large on digits (docs/learning_rates.md).

    When not to use it:
        When memory is short: for a square matrix its state, 8 (mn + m² + n²) bytes, is three times AdamW's;
        ``max_precond_dim`` limits it. It cannot be captured in a CUDA graph.

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv 2409.11321 (2024).

    >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
    >>> optimizer = SOAP([weight], lr=1.0, eps=1e-3)
    >>> for _ in range(2):  # the second step is the first that moves: along the gradient's polar factor
    ...     weight.grad = torch.tensor([[3.0, 4.0], [-0.8, 0.6]])
    ...     optimizer.step()
    >>> weight.detach().round(decimals=1)
    tensor([[-0.6000, -0.8000],
            [ 0.8000, -0.6000]])
    """

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        **options: Unpack[MatrixOptions],
    ) -> None: ...
