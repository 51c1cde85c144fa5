"""PolarGrad: the polar factor times the nuclear norm, so that the step vanishes with the gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.constructor import constructor
from steepest.rule import Group
from steepest.rules.muon import Muon, MuonOptions, MuonRule

__all__ = ["PolarGrad", "PolarGradRule"]


class PolarGradRule(MuonRule):
    """p ← p − η·⟨O, u⟩·O,   O = polar(u),   ⟨O, u⟩ being u's nuclear norm when O is exact."""

    name = "polargrad"

    def moves_like_adamw(self, group: Group) -> bool:
        """Return False: whatever the scale, an update is as large as the gradient's nuclear norm."""
        return False

    def finish(self, polar: Tensor, u: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Multiply by the dual norm of u, computed from the polar factor."""
        dual = (polar * u).sum(dim=(-2, -1), keepdim=True)
        # Both factors have it.
        extra = options["extra_scale"]
        return polar * (dual / extra if extra > 0 else dual), {}


class PolarGrad(Muon, rule=PolarGradRule(), defaults={"scale": "none"}):
    r"""Steepest descent under the spectral norm, with its dual norm as step length.

    .. math:: p \leftarrow p - \eta\lambda p - \eta\,\langle O, u\rangle\, O, \qquad O = \mathrm{polar}(u)

    Muon's direction has the same size whatever the gradient's; this one is the exact steepest descent
    step, ⟨O, u⟩ being the nuclear norm of u, and vanishes with the gradient. A ``scale`` multiplies both O,
    ``extra_scale`` the step.

    State: Muon's ``momentum_buffer``: 4 bytes per float32 parameter.

    Args:
        params: matrices: tensors, ``(name, tensor)`` pairs, or group dicts.
        lr: learning rate η ≥ 0, a float or a 1-element tensor.
        momentum: β in [0, 1) of Muon's average.
        weight_decay: λ ≥ 0, acting as ``weight_decay_method`` says.
        **options: :class:`Muon`'s (``scale`` is ``"none"`` here) and the common ones.

    Raises:
        TypeError: an unknown keyword, or parameters that are not tensors.
        ValueError: a value out of range; a parameter with fewer than two dimensions, by name.

    Tuning:
        - ``lr``: the step has the gradient's size, so lr depends on the scale of the loss. Measured here: 180
          times AdamW's on a small GPT, 5.7 times on digits (docs/learning_rates.md).
        - ``weight_decay``: keep lr·λ.
        - ``momentum``: 0.95; other values are not measured here.
        - batch size: a larger batch has a smaller gradient, and so a smaller step. Measured here: with 16
          times the batch and as many steps the best lr is the same on digits (docs/learning_rates.md).

    When not to use it:
        If the learning rate has to carry over from another model, since the gradient's scale is not divided
        out; and as for :class:`~steepest.Muon`.

    Source: Lau, Long and Su, "PolarGrad: A Class of Matrix-Gradient Optimizers from a Unifying
    Preconditioning Perspective", arXiv 2505.21799 (2025).

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
    >>> optimizer = PolarGrad([weight], lr=1.0, momentum=0.0, method="svd")
    >>> weight.grad = torch.diag(torch.tensor([3.0, 0.5]))
    >>> optimizer.step()
    >>> [round(value, 3) for value in weight.diagonal().tolist()]
    [-3.5, -3.5]
    """

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 1e-2,
        **options: Unpack[MuonOptions],
    ) -> None: ...
