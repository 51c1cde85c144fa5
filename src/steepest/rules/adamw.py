"""AdamW: the baseline, and the fallback for tensors that a matrix rule does not take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.hyperparameters import CommonOptions, at_least, betas, flag, learning_rate
from steepest.optimizer import Optimizer
from steepest.rule import ElementRule, Group, Scalar, weighted_sum, zeros

__all__ = ["AdamW", "AdamWRule"]


class AdamWRule(ElementRule):
    """m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  p ← p − η·(m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε)."""

    name = "adamw"
    hyper = {
        "lr": learning_rate(1e-3),
        "betas": betas((0.9, 0.999)),
        "eps": at_least(0, 1e-8),
        "weight_decay": at_least(0, 1e-2),
        "amsgrad": flag(False),
    }
    counts_steps = True

    def moves_like_adamw(self, group: Group) -> bool:
        """It is AdamW, AMSGrad included."""
        return True

    def init_state(self, param: Tensor, group: Group) -> dict[str, Tensor]:
        """Two averages, as large as the parameter; AMSGrad's maximum is a third."""
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
        return {name: zeros(param, group["state_dtype"]) for name in names}

    def scalars(self, step: Scalar, **hyper: Any) -> dict[str, Scalar]:
        """The bias corrections 1/(1 − βᵗ)."""
        beta1, beta2 = hyper["betas"]
        return {"correction1": 1 / (1 - beta1**step), "correction2": 1 / (1 - beta2**step)}

    def update(  # type: ignore[override]
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
        """Kingma and Ba's update; AMSGrad divides by the largest second moment so far."""
        beta1, beta2 = betas
        exp_avg = weighted_sum(beta1, exp_avg, 1 - beta1, grad)
        exp_avg_sq = weighted_sum(beta2, exp_avg_sq, 1 - beta2, grad * grad)
        state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        second = exp_avg_sq
        if max_exp_avg_sq is not None:
            second = state["max_exp_avg_sq"] = torch.maximum(max_exp_avg_sq, exp_avg_sq)
        denominator = _sqrt(second * correction2)
        denominator += eps
        direction = exp_avg * correction1
        direction /= denominator
        return direction, state


def _sqrt(x: Tensor) -> Tensor:
    """√x, in place, as x·(1/√x), at least 1e-19 in float32, so that eps = 0 divides no zero by zero.

    torch's sqrt on a CPU is a unit off in the last place where compiled code is exact; 1/√x is computed
    alike by both, and eager, compiled and sharded runs must give the same bits.
    """
    x.clamp_(min=torch.finfo(x.dtype).tiny)
    x *= x.rsqrt()
    return x


class AdamW(Optimizer, rule=AdamWRule()):
    r"""Adam with decoupled weight decay.

    .. math::
        m \leftarrow \beta_1 m + (1-\beta_1) g, \quad
        v \leftarrow \beta_2 v + (1-\beta_2) g^2, \quad
        p \leftarrow p - \eta\lambda p - \eta\,\frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)}+\epsilon}

    t counts the steps of the parameter. Checkpoints of ``torch.optim.AdamW``
    load as they are, but for complex parameters, whose state is kept in pairs of reals here.

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

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101 (2017).

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = AdamW([weight], lr=0.5, eps=0.0)
    >>> weight.grad = torch.tensor([3.0, -0.1])
    >>> optimizer.step()
    >>> [round(value, 6) for value in weight.tolist()]
    [-0.5, 0.5]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(
            params,
            rule="adamw",
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            **common,
        )
