"""QUAD: PSGD whose factors stay symmetric, moved by a quadratic form."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steepest.linalg import gram, symmetric_product
from steepest.linalg.product import product
from steepest.rules.psgd import PSGD, PSGDRule

__all__ = ["QUAD", "QUADRule"]


class QUADRule(PSGDRule):
    """Q ← (I − S/2) Q (I − S/2),  S = (η/L)(T − cI),  P = Q Q;   p ← p − lr·clip(P_l m P_r)."""

    name = "quad"

    def metric(self, q: Tensor, *, literal: bool) -> Tensor:
        """Return Q Q, as in the original, since Q is symmetric."""
        return gram(q)

    def fit_dense(self, q: Tensor, step: Tensor, **norm: Any) -> Tensor:
        """Return (I − S/2) Q (I − S/2), kept symmetric despite rounding."""
        q = product(step, q, added=q, alpha=-0.5)
        return symmetric_product(q, step, added=q, alpha=-0.5)

    def fit_diagonal(self, q: Tensor, step: Tensor) -> Tensor:
        return q * (1 - step / 2) ** 2


class QUAD(PSGD, rule=QUADRule()):
    r"""PSGD with Q symmetric: m whitened from both sides by factors that are fitted online.

    .. math::
        A = P_l\,(m + \text{noise})\,P_r, \quad
        S = \tfrac{\mu}{2L}(A A^\top - cI), \quad
        Q_l \leftarrow (I - S)\, Q_l\, (I - S), \quad P_l = Q_l Q_l, \quad
        p \leftarrow p - \eta\lambda p - \eta\,\mathrm{clip}(P_l\, m\, P_r) / 5

    A diagonal factor becomes q (1 − μ/(2L)·(T − c))². :class:`~steepest.rules.psgd.PSGD` has the rest of the
    equation, the shapes, the start and every option.

    State: that of :class:`~steepest.rules.psgd.PSGD`: 4 (mn + m² + n²) + 12 bytes for a float32 matrix with
    two dense factors.

    Args:
        params: tensors of any shape, ``(name, tensor)`` pairs, or group dicts.
        lr: learning rate η ≥ 0, a float or a 1-element tensor.
        lr_style, momentum, ...: see :class:`~steepest.rules.psgd.PSGD`.

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
          steps the best lr is the same on digits, with 4 times the batch the same on text
          (docs/learning_rates.md).

    When not to use it:
        When m² + n² numbers per matrix do not fit into memory, or a step's products, 28 n³, take too long:
        ``update_probability=0.03`` fits the factors less often, ``max_size_dense`` makes those of large
        sides diagonal.

    Source: X.-L. Li, "Stochastic Hessian Fittings with Lie Groups", arXiv 2402.11858 (2024); the class and
    its arguments are quad_torch's.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
    >>> optimizer = QUAD([weight], lr=1.0, lr_style=None, preconditioner_lr=0.1)
    >>> for _ in range(300):  # constant gradients, whatever their size, become updates of rms 1
    ...     before, weight.grad = weight.detach().clone(), torch.tensor([[1e-6, 0.0], [0.0, 1e-6]])
    ...     optimizer.step()
    >>> (0.9 * before - weight.detach()).round(decimals=2) + 0.0
    tensor([[1.4100, 0.0000],
            [0.0000, 1.4100]])
    """
