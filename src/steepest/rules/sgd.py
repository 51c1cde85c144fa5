"""SGD with momentum: the baseline, equal to torch's."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.arithmetic import average_in_place
from steepest.constructor import constructor
from steepest.hyperparameters import CommonOptions, at_least, flag, fraction, learning_rate
from steepest.optimizer import Optimizer
from steepest.rule import Group, Rule, Scalar, StateSpec

__all__ = ["SGD", "SGDRule"]


class SGDRule(Rule):
    """m ← μ m + (1−τ) g, and m ← g in the first step;   p ← p − η·m, or p − η·(g + μ m) with Nesterov."""

    name = "sgd"
    hyper = {
        "lr": learning_rate(),
        "momentum": at_least(0),
        "dampening": fraction(closed=True),
        "weight_decay": at_least(0),
        "nesterov": flag(),
    }
    weight_decay_method = "l2"
    counts_steps = True

    def check(self, owner: str, group: Group) -> None:
        super().check(owner, group)
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"{owner}: nesterov=True needs momentum > 0 and dampening = 0, "
                f"got momentum={group['momentum']!r}, dampening={group['dampening']!r}"
            )

    def state_specs(self, group: Group) -> dict[str, StateSpec]:
        beta = group["momentum"]
        return {"momentum_buffer": StateSpec(range="signed", beta=beta)} if beta != 0 else {}

    def scalars(self, step: Scalar, **hyper: Any) -> dict[str, Scalar]:
        """Return the gradient's weight, 1 in the first step."""
        first = 1.0 * (step == 1)
        return {"take": 1 - hyper["dampening"] * (1 - first)}

    def update(
        self,
        grad: Tensor,
        param: Tensor,
        momentum_buffer: Tensor | None = None,
        *,
        momentum: Scalar,
        take: Scalar,
        nesterov: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if momentum_buffer is None:
            return grad, {}
        buffer = average_in_place(momentum_buffer, momentum, grad, take)
        return (grad + momentum * buffer if nesterov else buffer), {"momentum_buffer": buffer}


class SGD(Optimizer, rule=SGDRule()):
    r"""Stochastic gradient descent, with momentum, dampening and Nesterov's form as in torch.

    .. math::
        m \leftarrow \mu m + (1-\tau) g, \qquad p \leftarrow p - \eta m

    with :math:`m = g` in a parameter's first step, and :math:`p \leftarrow p - \eta(g + \mu m)` with
    ``nesterov``. Weight decay is ``"l2"`` unless another method is chosen.

    State: ``momentum_buffer``, of the parameter's shape in ``state_dtype`` (4 bytes per float32
    parameter), when momentum is not 0; and one step count per tensor.

    Args:
        params: tensors, ``(name, tensor)`` pairs, or group dicts.
        lr: learning rate η ≥ 0, a float or a 1-element tensor.
        momentum: μ ≥ 0.
        dampening: τ in [0, 1].
        weight_decay: λ ≥ 0.
        nesterov: Nesterov's form; needs momentum and no dampening.
        **common: see :class:`~steepest.CommonOptions`; here ``weight_decay_method`` is ``"l2"``.

    Raises:
        TypeError: an unknown keyword, or parameters that are not tensors.
        ValueError: a value out of range; a parameter that cannot be optimized, by name.

    Tuning:
        - ``lr``: gradients are not normalized, so lr depends on the scale of the loss and of every layer.
          Measured here: 56 times AdamW's on a small GPT, 18 times on digits (docs/learning_rates.md).
        - ``weight_decay``: ``"l2"`` as in torch, of which momentum sums up 1/(1 − μ) steps; common recipes
          for convnets use about 5e-4.
        - ``momentum``: 0.9 in common recipes, some with ``nesterov``. Not measured here.
        - batch size: Goyal et al. (arXiv 1706.02677) scale lr in proportion to it, with a warm-up. Measured
          here: with 16 times the batch and as many steps the best lr is the same on digits
          (docs/learning_rates.md).

    When not to use it:
        For transformers from scratch: measured here, 3.60 bits per byte on a small GPT, AdamW 2.99.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning" (2013).

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = SGD([weight], lr=1.0, momentum=0.5)
    >>> for _ in range(3):
    ...     weight.grad = torch.ones(1)
    ...     optimizer.step()
    >>> weight.item()
    -4.25
    """

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None: ...
