"""Scion: conditional gradient steps in a ball of the spectral norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.constructor import constructor
from steepest.hyperparameters import positive
from steepest.rule import Group
from steepest.rules.muon import Muon, MuonOptions, MuonRule

__all__ = ["Scion", "ScionRule"]


class ScionRule(MuonRule):
    """p ← (1−η) p − η·ρ·√(out/in)·polar(m):   Muon with λ = 1, the RMS-to-RMS scale, and a radius ρ."""

    name = "scion"
    keeps_input = False
    hyper = {**MuonRule.hyper, "radius": positive()}

    def moves_like_adamw(self, group: Group) -> bool:
        """Return False: whatever the scale, the radius multiplies it."""
        return False

    def finish(self, polar: Tensor, u: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return options["radius"] * polar, {}


class Scion(Muon, rule=ScionRule(), defaults={"nesterov": False, "scale": "unit_rms_norm"}):
    r"""Stochastic conditional gradient with a spectral norm ball.

    .. math:: p \leftarrow (1-\eta)\,p - \eta\,\rho\,\sqrt{\mathrm{out}/\mathrm{in}}\;\mathrm{polar}(m)

    A step makes the parameter a convex combination of itself and the ball's corner opposite to the momentum,
    so that a parameter in the ball stays there. ``weight_decay=0`` is the unconstrained variant.

    State: Muon's ``momentum_buffer``: 4 bytes per float32 parameter.

    Args:
        params: matrices: tensors, ``(name, tensor)`` pairs, or group dicts.
        lr: η ≥ 0, a float or a 1-element tensor.
        momentum: β in [0, 1) of the average, 1 − α in the paper.
        weight_decay: 1, or 0 for the unconstrained variant; other values interpolate.
        radius: ρ > 0.
        **options: :class:`Muon`'s (no Nesterov and ``scale="unit_rms_norm"`` here) and the common ones.

    Raises:
        TypeError: an unknown keyword, or parameters that are not tensors.
        ValueError: a value out of range; a parameter with fewer than two dimensions, by name.

    Tuning:
        - ``lr``: the step is lr·radius long; lr alone determines how fast the weights forget. Measured here:
          0.31 times AdamW's on a small GPT, 0.18 times on digits, with ``radius=50``
          (docs/learning_rates.md).
        - ``weight_decay``: 1, or 0 for the unconstrained variant.
        - ``momentum``: 0.9; other values are not measured here.
        - batch size: keep lr, and search around it. Measured here: with 16 times the batch and as many
          steps the best lr is 0.56 times as large on digits (docs/learning_rates.md).

    When not to use it:
        For fine-tuning: the first steps pull weights that were trained without the constraint into the ball.
        Otherwise as for :class:`~steepest.Muon`.

    Source: Pethick et al., "Training Deep Learning Models with Norm-Constrained LMOs",
    arXiv 2502.07529 (2025).

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.eye(2))
    >>> optimizer = Scion([weight], lr=0.5, momentum=0.0, radius=2.0, method="svd")
    >>> weight.grad = torch.diag(torch.tensor([3.0, -0.5]))
    >>> optimizer.step()
    >>> [round(value, 3) for value in weight.diagonal().tolist()]
    [-0.5, 1.5]
    """

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 1.0,
        *,
        radius: float = 50.0,
        **options: Unpack[MuonOptions],
    ) -> None: ...
