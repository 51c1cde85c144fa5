"""AdEMAMix: AdamW with a second, slow average of the gradient beside the fast one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.arithmetic import average_in_place, exact_sqrt
from steepest.constructor import constructor
from steepest.hyperparameters import CommonOptions, at_least, betas, integer, learning_rate, optional
from steepest.optimizer import Optimizer
from steepest.rule import Group, Rule, Scalar, StateSpec

__all__ = ["AdEMAMix", "AdEMAMixRule"]


_DOWN = 2.0**-8


class AdEMAMixRule(Rule):
    """p ← p − η·(m₁/(1−β₁ᵗ) + α m₂) / (√(v/(1−β₂ᵗ)) + ε), with averages m₁ (β₁), m₂ (β₃) of g and v of g²."""

    name = "ademamix"
    hyper = {
        "lr": learning_rate(),
        "betas": betas(3),
        "alpha": at_least(0),
        "eps": at_least(0),
        "weight_decay": at_least(0),
        "t_alpha_beta3": optional(integer(low=1)),
    }
    counts_steps = True

    def moves_like_adamw(self, group: Group) -> bool:
        """Return True: the paper uses AdamW's learning rates, as the slow average contains little noise."""
        return True

    def state_specs(self, group: Group) -> dict[str, StateSpec]:
        beta1, _, beta3 = group["betas"]
        return {
            "exp_avg": StateSpec(range="signed", beta=beta1),
            "exp_avg_slow": StateSpec(range="signed", beta=beta3),
            "exp_avg_sq": StateSpec(range="nonnegative"),
        }

    def scalars(self, step: Scalar, **hyper: Any) -> dict[str, Scalar]:
        beta1, beta2, beta3 = hyper["betas"]
        alpha, warmup = hyper["alpha"], hyper["t_alpha_beta3"]
        progress: Scalar = 1.0 if warmup is None else _at_most(step / warmup, 1.0)
        return {
            "correction1": 1 / (1 - beta1**step),
            "correction2": 1 / (1 - beta2**step),
            "slow_beta": beta3 if warmup is None else _scheduled_beta(progress, beta1, beta3),
            "slow_weight": progress * alpha,
        }

    def update(
        self,
        grad: Tensor,
        param: Tensor,
        exp_avg: Tensor,
        exp_avg_slow: Tensor,
        exp_avg_sq: Tensor,
        *,
        betas: tuple[Any, Any, Any],
        eps: Scalar,
        correction1: Scalar,
        correction2: Scalar,
        slow_beta: Scalar,
        slow_weight: Scalar,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the direction; the slow average has no bias correction."""
        beta1, beta2, _ = betas
        exp_avg = average_in_place(exp_avg, beta1, grad)
        exp_avg_slow = average_in_place(exp_avg_slow, slow_beta, grad)
        exp_avg_sq = average_in_place(exp_avg_sq, beta2, grad * grad)
        denominator = exact_sqrt(exp_avg_sq * correction2)
        denominator += eps
        # Scaled, by a power of two: the sum of averages near the largest number would be ∞, and ∞/∞.
        direction = exp_avg * (correction1 * _DOWN)
        direction += (slow_weight * _DOWN) * exp_avg_slow
        direction /= denominator
        direction /= _DOWN
        return direction, {"exp_avg": exp_avg, "exp_avg_slow": exp_avg_slow, "exp_avg_sq": exp_avg_sq}


def _at_most(value: Scalar, limit: float) -> Scalar:
    return value.clamp(max=limit) if isinstance(value, Tensor) else min(value, limit)


def _scheduled_beta(progress: Scalar, start: float, end: float) -> Scalar:
    """Return β whose half-life grows linearly from ``start``'s to ``end``'s, and never above ``end``."""
    # 1/(−ln β) is the half-life over ln 2. It is linear in the progress, and 0 for β = 0.
    first, last = (-1 / math.log(beta) if beta > 0 else 0.0 for beta in (start, end))
    life = (1 - progress) * first + progress * last
    if isinstance(life, Tensor):
        return _at_most(torch.exp(-1 / life), end)
    return _at_most(math.exp(-1 / life) if life > 0 else 0.0, end)


class AdEMAMix(Optimizer, rule=AdEMAMixRule()):
    r"""AdamW with a mixture of two averages of the gradient: a fast one, and one of ten thousand steps.

    .. math::
        m_1 \leftarrow \beta_1 m_1 + (1-\beta_1) g, \quad
        m_2 \leftarrow \beta_3^{(t)} m_2 + (1-\beta_3^{(t)}) g, \quad
        v \leftarrow \beta_2 v + (1-\beta_2) g^2

    .. math::
        p \leftarrow p - \eta\lambda p
        - \eta\,\frac{m_1/(1-\beta_1^t) + \alpha^{(t)} m_2}{\sqrt{v/(1-\beta_2^t)}+\epsilon}

    t counts the steps of the parameter. With T = ``t_alpha_beta3`` both schedules warm the slow average up:
    :math:`\alpha^{(t)} = \alpha\min(t/T, 1)`, and the half-life of :math:`\beta_3^{(t)}` grows linearly from
    β₁'s to β₃'s within T steps; None takes α and β₃ from the first step on, which may diverge early. The
    paper sets T to the total number of steps. Learning rate and weight decay are AdamW's.

    A gradient whose square is infinite (above 1.8e19 in float32, and above 8,094 where the average of squares
    is float16) makes the second moment infinite: that element then never moves again, apart from weight
    decay, and ``nonfinite`` does not look for it.

    State: ``exp_avg``, ``exp_avg_slow`` and ``exp_avg_sq``, of the parameter's shape in ``state_dtype``: 12
    bytes per float32 parameter; and one step count per tensor. The slow average takes steps of
    (1 − β₃)·(g − m₂), which bfloat16 loses: leave it float32.

    Args:
        params: tensors, ``(name, tensor)`` pairs, or group dicts.
        lr: learning rate η ≥ 0, a float or a 1-element tensor.
        betas: β₁ of the fast average, β₂ of the squares, β₃ of the slow average, each in [0, 1).
        alpha: weight α ≥ 0 of the slow average; the paper's range is 4 to 10.
        eps: ε ≥ 0.
        weight_decay: λ ≥ 0, acting as ``weight_decay_method`` says.
        t_alpha_beta3: T ≥ 1 of both schedules, in steps; None switches them off.
        **common: see :class:`~steepest.CommonOptions`.

    Raises:
        TypeError: an unknown keyword, or parameters that are not tensors.
        ValueError: a value out of range; a parameter that cannot be optimized, by name.

    Tuning:
        - ``lr``: AdamW's; measured here: the same best value on both tasks (docs/learning_rates.md).
        - ``weight_decay``: AdamW's.
        - ``betas``: β₃ = 0.9999 averages over ten thousand steps; set ``t_alpha_beta3`` to the length of
          the run, as the authors do.
        - batch size: keep lr, and search around it. Measured here: with 16 times the batch and as many
          steps the best lr is 0.32 times as large on digits (docs/learning_rates.md).

    When not to use it:
        Short runs: in 400 steps on a small GPT it equalled AdamW (2.985 bits per byte) with 12 bytes of
        state instead of 8. If the data changes during training, the slow average keeps old gradients for
        thousands of steps (not measured here).

    Source: Pagliardini, Ablin and Grangier, "The AdEMAMix Optimizer: Better, Faster, Older",
    arXiv 2409.03137 (2024).

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = AdEMAMix([weight], lr=0.5, betas=(0.9, 0.999, 0.75), alpha=4.0, eps=0.0)
    >>> weight.grad = torch.tensor([3.0, -0.1])
    >>> optimizer.step()  # 1 of the fast average, 4·(1 − 0.75) of the slow one
    >>> [round(value, 6) for value in weight.tolist()]
    [-1.0, 1.0]
    """

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        t_alpha_beta3: int | None = None,
        **common: Unpack[CommonOptions],
    ) -> None: ...
