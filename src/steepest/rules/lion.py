"""Lion: sign of an interpolation between momentum and gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.arithmetic import average_in_place, weighted_sum
from steepest.constructor import constructor
from steepest.hyperparameters import CommonOptions, at_least, betas, learning_rate
from steepest.optimizer import Optimizer
from steepest.rule import Group, Rule, StateSpec

__all__ = ["Lion", "LionRule"]


class LionRule(Rule):
    """c = β₁ m + (1−β₁) g,   p ← p − η·sign(c),   m ← β₂ m + (1−β₂) g       (Chen et al. 2023)."""

    name = "lion"
    hyper = {"lr": learning_rate(), "betas": betas(2), "weight_decay": at_least(0)}

    def state_specs(self, group: Group) -> dict[str, StateSpec]:
        return {"exp_avg": StateSpec(range="signed", beta=group["betas"][1])}

    def update(
        self, grad: Tensor, param: Tensor, exp_avg: Tensor, *, betas: tuple[Any, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the direction from the momentum as it was before this gradient."""
        beta1, beta2 = betas
        direction = weighted_sum(beta1, exp_avg, 1 - beta1, grad).sign_()
        return direction, {"exp_avg": average_in_place(exp_avg, beta2, grad)}


class Lion(Optimizer, rule=LionRule()):
    r"""Lion (EvoLved Sign Momentum).

    .. math::
        c = \beta_1 m + (1-\beta_1) g, \qquad
        p \leftarrow p - \eta\lambda p - \eta\,\mathrm{sign}(c), \qquad
        m \leftarrow \beta_2 m + (1-\beta_2) g

    Every coordinate moves by η, whatever the gradient's size. Compared with AdamW, divide the learning
    rate by 3 to 10 and multiply the weight decay by the same factor: their product is what counts.

    State: ``exp_avg``, of the parameter's shape in ``state_dtype``: 4 bytes per float32 parameter.

    Args:
        params: tensors, ``(name, tensor)`` pairs, or group dicts.
        lr: learning rate η ≥ 0, a float or a 1-element tensor.
        betas: β₁ of the direction's interpolation, β₂ of the momentum, each in [0, 1).
        weight_decay: λ ≥ 0, acting as ``weight_decay_method`` says.
        **common: see :class:`~steepest.CommonOptions`.

    Raises:
        TypeError: an unknown keyword, or parameters that are not tensors.
        ValueError: a value out of range; a parameter that cannot be optimized, by name.

    Tuning:
        - ``lr``: a third to a tenth of AdamW's (the authors). Measured here: 0.31 times on a small GPT, 0.57
          times on digits (docs/learning_rates.md); :func:`steepest.from_adamw` has the table.
        - ``weight_decay``: 3 to 10 times AdamW's (the authors), which keeps lr·λ.
        - ``betas``: (0.9, 0.99); the authors use (0.95, 0.98) against instability.
        - batch size: 64 or more; below, the authors saw no gain over AdamW. Measured here: with 16 times
          the batch and as many steps the best lr is 0.31 times as large on digits; with 4 times the batch
          it does not rise on text, and AdamW gains more (docs/learning_rates.md).

    When not to use it:
        For short training from scratch: measured here, 3.323 bits per byte after 400 steps of a small GPT,
        AdamW 2.985. After 8,000 steps it had caught up (docs/which-optimizer.md).

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675 (2023).

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = Lion([weight], lr=0.25)
    >>> weight.grad = torch.tensor([0.5, -3.0])
    >>> optimizer.step()
    >>> weight.tolist()
    [0.75, 1.25]
    """

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **common: Unpack[CommonOptions],
    ) -> None: ...
