"""The constructor that QUAD and Procrustes share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from steepest.constructor import constructor
from steepest.hyperparameters import CommonOptions
from steepest.optimizer import Optimizer
from steepest.views import View

__all__ = ["PSGD"]


class PSGD(Optimizer):
    r"""PSGD with Kronecker factors: what :class:`~steepest.QUAD` and :class:`~steepest.Procrustes` share.

    .. math::
        m \leftarrow \beta m + (1-\beta) g, \quad
        A = P_l\,(m + \text{noise})\,P_r, \quad
        T = A A^\top, \quad
        Q_l \leftarrow \mathrm{fit}(Q_l, T), \quad P_l = Q_l^\top Q_l

    .. math::
        u = P_l\, m\, P_r, \quad u \leftarrow \frac{1.1\,u}{\max(\mathrm{rms}(u),\, 1.1)}, \quad
        p \leftarrow p - \eta\lambda p - \eta\, u / 5

    for an m×n matrix, and likewise from the right with :math:`T = A^\top A`; m = g in the first step. The
    subclasses differ in fit, a step of size μ/L along T − cI: c is numel/size of the side, so that A tends to
    have unit covariance; L is the largest recent :math:`\lVert T\rVert_2 + c` (it rises at once and falls by
    5 % a step); μ = max(0.3, μ₀/√(1 + t/10000)), at most μ₀ = ``preconditioner_lr``. A diagonal factor takes
    the row or column sums of A² for T.

    **Shapes.** Three or more dimensions are merged into the most square matrix, (128, 64, 3, 3) into
    128×576; 0-D and 1-D parameters, and matrices of one row or column, have one diagonal factor. A side
    of size s is diagonal if s > ``max_size_dense`` or s² > ``max_skew_dense``·numel, else dense.
    Parameters of one shape are stacked and fitted by batched products.

    **Start.** Q = s·I with :math:`s = (\mathrm{mean}\,g^2 + \text{noise}^2)^{-1/8}` for two factors and
    ^(−1/4) for one. Each tensor measures s from its first gradient that is not zero, so that its first update
    is white already. Q does not move while a gradient is zero or s is not measured.

    State: ``momentum_buffer``, of the parameter's shape in ``state_dtype``, and for each matrix ``Q_left``
    and ``Q_right`` (for a vector ``Q``): m² or m and n² or n numbers, dense ones in ``dtype``, diagonal ones
    in float32 at least; three numbers, ``L_left``, ``L_right`` and ``scale``; with ``update_probability`` < 1
    as many numbers again as the dense Q have. In float32 with two dense factors that is 4 (mn + m² + n²) + 12
    bytes, and ``step`` for each parameter. Q is kept divided by ``scale``.

    Args:
        params: tensors of any shape, ``(name, tensor)`` pairs, or group dicts.
        lr: learning rate η ≥ 0, a float or a 1-element tensor.
        lr_style: ``"adam"`` divides u by 5, so that AdamW's learning rate carries over: rms 0.19 to 0.2
            for matrices with a diagonal side, 0.17 for square ones on pure noise (docs/psgd.md has why);
            None takes u, of rms near 1, as it is.
        momentum: β in [0, 1).
        weight_decay: λ ≥ 0, acting as ``weight_decay_method`` says, with the undivided lr.
        max_size_dense: larger sides have diagonal factors.
        max_skew_dense: sides with s² > this·numel have diagonal factors; ``math.inf`` makes all dense.
        preconditioner_lr: μ₀ > 0.
        preconditioner_init_scale: s > 0; None measures it, as above.
        noise_scale: damping. Where Q is fitted, (``noise_scale`` + ε rms(m))·N(0, 1) is added to m, with ε
            the machine epsilon of ``dtype``, so that rows without a gradient stay within its range. A
            matrix's noise is Hankel: m+n−1 draws with the second moments of mn. 0 adds nothing at all, for
            gradients that reach every row and column: where one is always zero, its factor grows without
            bound, and after some hundred steps the rest of the update has become zero beside it.
        dtype: of the products, and of dense Q; None takes the gradient's, and the parameter's for Q.
            Traces, bounds and diagonal factors are in float32 at least.
        preconditioner_min_lr: the 0.3 of μ.
        whiten: fit Q to the ``"momentum"`` or to the ``"gradient"``; u is P_l m P_r in either case.
        update_probability: Q is fitted in each of the first ``update_flat_steps`` steps; then the
            probability falls as exp(−τ/``update_decay_steps``), τ steps later, to this one. Probability
            accumulates, and Q is fitted when the sum passes an integer, so nothing is random; P is kept in
            between. 0.03 is for long runs.
        update_flat_steps: how many steps fit Q before the probability falls.
        update_decay_steps: how slowly it falls; 0 for at once.
        norm: compute ‖T‖₂ by ``"bound"``, from below by power iteration
            (:func:`steepest.linalg.spectral_norm_bound`), or ``"exact"``: slow; an oracle.
        literal: follow the original's code: s is the same for all tensors of a group, ^(−1/4) of their
            largest mean g²; noise without ε; μ ≥ 0.3 whatever μ₀.
        views: parameter names -> blocks (:mod:`steepest.views`) of fused parameters, each preconditioned
            by itself.
        bucket_bytes: bound on the working memory of matrices that are computed together, in bytes; 2²⁸ by
            default.
        **common: see :class:`~steepest.CommonOptions`.

    Raises:
        TypeError: an unknown keyword, or parameters that are not tensors.
        ValueError: a value out of range; a view that does not fit its parameter, by name.

    Source: X.-L. Li, "Stochastic Hessian Fittings with Lie Groups", arXiv 2402.11858 (2024), and
    arXiv 2402.04553 (2024), 1512.04202 (2015), 1809.10232 (2018), 2211.04422 (2022); the class and its
    arguments are quad_torch's.
    """

    @constructor
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        lr_style: Literal["adam"] | None = "adam",
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        max_size_dense: float = 16384,
        max_skew_dense: float = 1.0,
        preconditioner_lr: float = 0.7,
        preconditioner_init_scale: float | None = None,
        noise_scale: float = 1e-9,
        dtype: torch.dtype | None = None,
        *,
        preconditioner_min_lr: float = 0.3,
        whiten: Literal["momentum", "gradient"] = "momentum",
        update_probability: float = 1.0,
        update_flat_steps: int = 1000,
        update_decay_steps: int = 1000,
        norm: Literal["bound", "exact"] = "bound",
        literal: bool = False,
        views: Mapping[str, View] | None = None,
        bucket_bytes: int = 1 << 28,
        **common: Unpack[CommonOptions],
    ) -> None: ...
