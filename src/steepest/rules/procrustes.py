"""Procrustes: PSGD whose factors are turned toward symmetry, one rotation per step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steepest.linalg import gram, procrustes_rotation
from steepest.linalg.product import product
from steepest.rules.psgd import PSGD, PSGDRule

__all__ = ["Procrustes", "ProcrustesRule"]


class ProcrustesRule(PSGDRule):
    """Q ← rotate(Q − S Q),  S = (η/L)(T − cI),  P = QᵀQ;   p ← p − lr·clip(P_l m P_r)."""

    name = "procrustes"

    def metric(self, q: Tensor, *, literal: bool) -> Tensor:
        """Return QᵀQ, which no rotation changes; the original's QQ equals it only for symmetric Q."""
        return product(q, q) if literal else gram(q.mT)

    def fit_dense(self, q: Tensor, step: Tensor, **norm: Any) -> Tensor:
        """Return Q − S Q, one rotation closer to the symmetric factor of the same P."""
        return procrustes_rotation(product(step, q, added=q, alpha=-1.0), **norm)

    def fit_diagonal(self, q: Tensor, step: Tensor) -> Tensor:
        return q * (1 - step)


class Procrustes(PSGD, rule=ProcrustesRule()):
    r"""PSGD with Q turned toward symmetry: m whitened from both sides by factors that are fitted online.

    .. math::
        A = P_l\,(m + \text{noise})\,P_r, \quad
        Q_l \leftarrow \mathrm{rotate}\big(Q_l - \tfrac{\mu}{L}(A A^\top - cI)\, Q_l\big), \quad
        P_l = Q_l^\top Q_l, \quad
        p \leftarrow p - \eta\lambda p - \eta\,\mathrm{clip}(P_l\, m\, P_r) / 5

    A diagonal factor becomes q (1 − (μ/L)(T − c)). :class:`~steepest.rules.psgd.PSGD` has the rest of the
    equation, the shapes, the start and every option.

    State: that of :class:`~steepest.rules.psgd.PSGD`: 4 (mn + m² + n²) + 12 bytes for a float32 matrix with
    two dense factors.

    Args:
        params: tensors of any shape, ``(name, tensor)`` pairs, or group dicts.
        lr: learning rate η ≥ 0, a float or a 1-element tensor.
        lr_style, momentum, ...: see :class:`~steepest.rules.psgd.PSGD`; ``norm`` also selects
            how the rotation's norm is computed, and ``literal`` uses P = QQ, as the original's code does,
            which differs while Q is not yet symmetric.

    Raises:
        TypeError: an unknown keyword, or parameters that are not tensors.
        ValueError: a value out of range; a view that does not fit its parameter, by name.

    Tuning:
        - ``lr``: AdamW's by design. Measured here: 5.6 times AdamW's on a small GPT, the same on digits
          (docs/learning_rates.md).
        - ``weight_decay``: keep lr·λ.
        - ``momentum``: 0.95, the authors'; other values are not measured here.
        - ``preconditioner_lr``: 0.7; 0.1 whitens more exactly and adapts more slowly (docs/psgd.md).
        - batch size: keep lr, and search around it. Measured here: with 16 times the batch and as many
          steps the best lr is the same on digits (docs/learning_rates.md).

    When not to use it:
        As for :class:`~steepest.QUAD`. The two did not differ significantly here: 2.591 ± 0.022 and
        2.571 ± 0.024 bits per byte in the sweep on a small GPT.

    Source: X.-L. Li, "Stochastic Hessian Fittings with Lie Groups", arXiv 2402.11858 (2024); the class and
    its arguments are quad_torch's.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
    >>> optimizer = Procrustes([weight], lr=1.0, lr_style=None, preconditioner_lr=0.1)
    >>> for _ in range(300):  # constant gradients, whatever their size, become updates of rms 1
    ...     before, weight.grad = weight.detach().clone(), torch.tensor([[1e-6, 0.0], [0.0, 1e-6]])
    ...     optimizer.step()
    >>> (0.9 * before - weight.detach()).round(decimals=2) + 0.0
    tensor([[1.4100, 0.0000],
            [0.0000, 1.4100]])
    """
