"""NorMuon: Muon with rows that are normalized by their second moment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.constructor import constructor
from steepest.hyperparameters import fraction, positive
from steepest.rule import Group, Scalar, StateSpec
from steepest.rules.muon import Muon, MuonOptions, MuonRule

__all__ = ["NorMuon", "NorMuonRule"]


class NorMuonRule(MuonRule):
    """v ← β₂ v + (1−β₂) mean(O², over a row);   Ô = O / (√v + ε);   p ← p − η·Ô·‖O‖_F / ‖Ô‖_F."""

    name = "normuon"
    keeps_input = False
    hyper = {**MuonRule.hyper, "beta2": fraction(), "eps": positive()}

    def matrix_specs(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, StateSpec]:
        wide = torch.promote_types(torch.float32, dtype)
        return {"second_momentum": StateSpec("matrix", wide, (*shape[:-1], 1))}

    def finish(  # type: ignore[override]
        self, polar: Tensor, u: Tensor, *, second_momentum: Tensor, beta2: Scalar, eps: Scalar, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalize the rows, and keep the matrix's Frobenius norm."""
        mean = (polar * polar).mean(dim=-1, keepdim=True)
        second = beta2 * second_momentum.to(polar.dtype) + (1 - beta2) * mean
        evened = polar / (second.sqrt() + eps)
        before, after = (torch.linalg.matrix_norm(matrix, keepdim=True) for matrix in (polar, evened))
        # A zero matrix stays zero, instead of 0/0.
        return evened * torch.where(after > 0, before / after, 0.0), {"second_momentum": second}


class NorMuon(Muon, rule=NorMuonRule()):
    r"""Muon with neuron-wise normalization.

    .. math::
        v \leftarrow \beta_2 v + (1-\beta_2)\,\mathrm{mean}_{\text{row}}(O^2), \quad
        \hat O = \frac{O}{\sqrt v + \epsilon}, \quad
        p \leftarrow p - \eta\lambda p - \eta\,\frac{\lVert O\rVert_F}{\lVert\hat O\rVert_F}\hat O

    with O Muon's scaled polar factor. Muon's update has orthonormal rows only if there are fewer rows than
    columns; here the rows (neurons) of any matrix move alike.

    State: Muon's ``momentum_buffer`` (4 bytes per float32 parameter) and ``second_momentum``,
    float32 (float64 for float64 parameters), one number per row.

    Args:
        params: matrices: tensors, ``(name, tensor)`` pairs, or group dicts.
        lr: learning rate η ≥ 0, a float or a 1-element tensor.
        momentum: β in [0, 1) of Muon's average.
        weight_decay: λ ≥ 0, acting as ``weight_decay_method`` says.
        beta2: β₂ in [0, 1).
        eps: ε > 0.
        **options: :class:`Muon`'s, and the common ones.

    Raises:
        TypeError: an unknown keyword, or parameters that are not tensors.
        ValueError: a value out of range; a parameter with fewer than two dimensions, by name.

    Tuning:
        - ``lr``: as for Muon. Measured here: 10 times AdamW's on a small GPT, the same on digits
          (docs/learning_rates.md).
        - ``weight_decay``: as for Muon.
        - ``momentum, beta2``: 0.95 for both; other values are not measured here.
        - batch size: keep lr, and search around it. Measured here: with 16 times the batch and as many
          steps the best lr is 0.57 times as large on digits (docs/learning_rates.md).

    When not to use it:
        As for :class:`~steepest.Muon`. If rows are not neurons, as in a transposed weight, declare the view.

    Source: Li et al., "NorMuon: Making Muon more efficient and scalable", arXiv 2510.05491 (2025).

    >>> weight = torch.nn.Parameter(torch.zeros(2, 1))
    >>> optimizer = NorMuon([weight], lr=1.0, momentum=0.0, scale="none", method="svd")
    >>> weight.grad = torch.tensor([[4.0], [-3.0]])
    >>> optimizer.step()
    >>> [round(value, 3) for value in weight.flatten().tolist()]  # both rows alike, norm 1
    [-0.707, 0.707]
    """

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 1e-2,
        beta2: float = 0.95,
        eps: float = 1e-8,
        **options: Unpack[MuonOptions],
    ) -> None: ...
