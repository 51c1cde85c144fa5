"""AdamW: the baseline, and the fallback for tensors that a matrix rule does not take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.arithmetic import average_in_place, exact_sqrt
from steepest.constructor import constructor
from steepest.hyperparameters import CommonOptions, at_least, betas, flag, learning_rate
from steepest.optimizer import Optimizer
from steepest.rule import Group, Rule, Scalar, StateSpec

__all__ = ["AdamW", "AdamWRule"]


class AdamWRule(Rule):
    """m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  p ← p − η·(m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε)."""

    name = "adamw"
    hyper = {
        "lr": learning_rate(),
        "betas": betas(2),
        "eps": at_least(0),
        "weight_decay": at_least(0),
        "amsgrad": flag(),
    }
    counts_steps = True

    def moves_like_adamw(self, group: Group) -> bool:
        return True

    def state_specs(self, group: Group) -> dict[str, StateSpec]:
        squares = ["exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
        return {
            "exp_avg": StateSpec(range="signed", beta=group["betas"][0]),
            **dict.fromkeys(squares, StateSpec(range="nonnegative")),
        }

    def scalars(self, step: Scalar, **hyper: Any) -> dict[str, Scalar]:
        beta1, beta2 = hyper["betas"]
        return {"correction1": 1 / (1 - beta1**step), "correction2": 1 / (1 - beta2**step)}

    def update(
        self,
        grad: Tensor,
        param: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        max_exp_avg_sq: Tensor | None = None,
        *,
        betas: tuple[Any, Any],
        eps: Scalar,
        correction1: Scalar,
        correction2: Scalar,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute Kingma and Ba's update; AMSGrad divides by the largest second moment so far."""
        beta1, beta2 = betas
        exp_avg = average_in_place(exp_avg, beta1, grad)
        exp_avg_sq = average_in_place(exp_avg_sq, beta2, grad * grad)
        state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        second = exp_avg_sq
        if max_exp_avg_sq is not None:
            second = state["max_exp_avg_sq"] = torch.maximum(max_exp_avg_sq, exp_avg_sq)
        # Both are halves: the corrected average of gradients near the largest number would be ∞, and ∞/∞.
        denominator = exact_sqrt(second * (correction2 * 0.25))
        denominator += eps * 0.5
        direction = exp_avg * (correction1 * 0.5)
        direction /= denominator
        return direction, state


class AdamW(Optimizer, rule=AdamWRule()):
    r"""Adam with decoupled weight decay.

    .. math::
        m \leftarrow \beta_1 m + (1-\beta_1) g, \quad
        v \leftarrow \beta_2 v + (1-\beta_2) g^2, \quad
        p \leftarrow p - \eta\lambda p - \eta\,\frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)}+\epsilon}

    t counts the steps of the parameter. Checkpoints of ``torch.optim.AdamW`` load, except for complex
    parameters, whose state consists of pairs of reals here.

    A gradient whose square is infinite (above 1.8e19 in float32, and above 8,094 where the average of squares
    is float16) makes the second moment infinite: from then on that element stands still, apart from weight
    decay, and ``nonfinite`` does not look for it. torch's AdamW does the same, above 5.8e20 in float32.

    State: ``exp_avg`` and ``exp_avg_sq`` (and ``max_exp_avg_sq`` with AMSGrad), of the parameter's
    shape in ``state_dtype``: 8 (12) bytes per float32 parameter; and one step count per tensor.

    Args:
        params: tensors, ``(name, tensor)`` pairs, or group dicts.
        lr: learning rate η ≥ 0, a float or a 1-element tensor.
        betas: β₁ and β₂ of the two averages, each in [0, 1).
        eps: ε ≥ 0.
        weight_decay: λ ≥ 0, acting as ``weight_decay_method`` says.
        amsgrad: divide by the largest second moment so far (Reddi et al. 2018).
        **common: see :class:`~steepest.CommonOptions`.

    Raises:
        TypeError: an unknown keyword, or parameters that are not tensors.
        ValueError: a value out of range; a parameter that cannot be optimized, by name.

    Tuning:
        - ``lr``: measured here: 0.0018 is best on the sweep's small GPT (docs/learning_rates.md), the
          baseline of every table. Large models are commonly trained with 1e-5 to 1e-3.
        - ``weight_decay``: what matters is lr·λ; its inverse is the number of steps over which the weights
          average.
        - ``betas``: β₂ = 0.999 is torch's default. Language models are often trained with 0.95, which
          forgets a spike sooner. Not measured here.
        - batch size: common practice is a larger lr and a smaller β₂ for a larger batch. Measured here,
          with β₂ unchanged: with 16 times the batch and as many steps the best lr is 0.32 times as large on
          digits, with 4 times the batch the same on text after 400 steps, but 3.1 times as large after
          1,000 (docs/learning_rates.md): search again.

    When not to use it:
        When 8 bytes of state per parameter do not fit: Lion has 4, ``state_dtype="int8"`` 2.1, SignGSD none.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101 (2017).

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = AdamW([weight], lr=0.5, eps=0.0)
    >>> weight.grad = torch.tensor([3.0, -0.1])
    >>> optimizer.step()
    >>> [round(value, 6) for value in weight.tolist()]
    [-0.5, 0.5]
    """

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None: ...
