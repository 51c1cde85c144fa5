"""Procrustes: PSGD whose factors are turned toward symmetry, a rotation a step."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from steepest.linalg import gram, procrustes_rotation
from steepest.linalg.product import product
from steepest.random import Key
from steepest.rules.psgd import PSGD, PSGDRule

__all__ = ["Procrustes", "ProcrustesRule"]


class ProcrustesRule(PSGDRule):
    """Q ← rotate(Q − S Q),  S = (η/L)(T − cI),  P = QᵀQ;   p ← p − lr·clip(P_l m P_r)."""

    name = "procrustes"

    def metric(self, q: Tensor, *, literal: bool) -> Tensor:
        """QᵀQ, which no rotation changes; the original's QQ is the same only where Q is symmetric."""
        return product(q, q) if literal else gram(q.mT)

    def fit_dense(
        self, q: Tensor, step: Tensor, *, norm: Callable[[Tensor], Tensor] | None, key: Key
    ) -> Tensor:
        """Q − S Q, one rotation nearer to the symmetric factor of the same P."""
        return procrustes_rotation(product(step, q, added=q, alpha=-1.0), norm=norm, key=key)

    def fit_diagonal(self, q: Tensor, step: Tensor) -> Tensor:
        """q (1 − S)."""
        return q * (1 - step)


class Procrustes(PSGD, rule=ProcrustesRule()):
    r"""PSGD with Q turned toward symmetry: m whitened from both sides by factors that are fitted online.

    .. math::
        m \leftarrow \beta m + (1-\beta) g, \quad
        A = P_l\,(m + \text{noise})\,P_r, \quad
        T = A A^\top, \quad
        Q_l \leftarrow \mathrm{rotate}\big(Q_l - \tfrac{\mu}{L}(T - cI)\, Q_l\big), \quad P_l = Q_l^\top Q_l

    .. math::
        u = P_l\, m\, P_r, \quad u \leftarrow \frac{1.1\,u}{\max(\mathrm{rms}(u),\, 1.1)}, \quad
        p \leftarrow p - \eta\lambda p - \eta\, u / 5

    for m×n matrices, alike from the right with :math:`T = A^\top A`; m = g in the first step. c is
    numel/size of the side, so that A tends to have unit covariance; L is the largest recent
    :math:`\lVert T\rVert_2 + c` (up at once, down by 5 % a step); μ = max(0.3, μ₀/√(1 + t/10000)), at most
    μ₀ = ``preconditioner_lr``. A diagonal factor takes the row or column sums of A² for T:
    q ← q (1 − (μ/L)(T − c)).

    **Shapes.** Three or more dimensions are merged into the most square matrix, (128, 64, 3, 3) into
    128×576; 0-D and 1-D parameters, and matrices of one row or column, have one diagonal factor. A side
    of size s is diagonal if s > ``max_size_dense`` or s² > ``max_skew_dense``·numel, else dense.
    Parameters of one shape are stacked and fitted by batched products.

    **Start.** Q = s·I with :math:`s = (\mathrm{mean}\,g^2 + \text{noise}^2)^{-1/8}` for two factors and
    ^(−1/4) for one, for every tensor by itself from its first gradient that is not zero: the first update
    is white already. While a gradient is zero, and until s is measured, Q does not move.

    State: ``momentum_buffer``, of the parameter's shape in ``state_dtype``, and for each matrix
    ``Q_left``, ``Q_right`` (a vector: ``Q``), m² or m and n² or n numbers, dense ones in ``dtype``,
    diagonal ones in float32 at least; three numbers, ``L_left``, ``L_right`` and ``scale``; with
    ``update_probability`` < 1 as many numbers again as the dense Q have. Float32 bytes with two dense
    factors: 4 (mn + m² + n²) + 12, and ``step`` for each parameter. Q is kept divided by ``scale``.

    Args:
        params: tensors of any shape, ``(name, tensor)`` pairs, or group dicts.
        lr: learning rate η ≥ 0, a float or a 1-element tensor.
        lr_style: ``"adam"`` divides u by 5, so that AdamW's learning rate carries over: rms 0.19 to 0.2
            for matrices with a diagonal side, 0.17 for square ones on pure noise (docs/psgd.md has why);
            None takes u, of rms near 1, as it is.
        momentum: β in [0, 1).
        weight_decay: λ ≥ 0, acting as ``weight_decay_method`` says, with the undivided lr.
        max_size_dense: sides larger than this have diagonal factors.
        max_skew_dense: sides with s² > this·numel have diagonal factors; ``math.inf`` makes all dense.
        preconditioner_lr: μ₀ > 0.
        preconditioner_init_scale: s > 0; None measures it, as above.
        noise_scale: damping: (``noise_scale`` + ε rms(m))·N(0, 1) is added to m where Q is fitted (a matrix
            is Hankel: m+n−1 draws with the second moments of mn), ε the
            machine epsilon of ``dtype``, so that rows without a gradient stay within its range; 0 adds
            nothing at all, for gradients
            that reach every row and column: where one is always zero its factor grows for ever, and after
            some hundred steps the rest of the update has become zero beside it.
        dtype: of the products, and of dense Q; None takes the gradient's, and the parameter's for Q.
            Traces, bounds and diagonal factors are in float32 at least.
        preconditioner_min_lr: the 0.3 of μ.
        whiten: fit Q to the ``"momentum"`` or to the ``"gradient"``; u is P_l m P_r in any case.
        update_probability: Q is fitted in each of the first ``update_flat_steps`` steps; then the
            probability falls as exp(−τ/``update_decay_steps``), τ steps later, to this one. Probability is
            accumulated and Q fitted when it passes an integer, so nothing is random. P is kept between.
            0.03 is for long runs.
        update_flat_steps: see there.
        update_decay_steps: see there; 0 for at once.
        norm: ‖T‖₂ and the rotation's by ``"bound"``, from below by power iteration
            (:func:`steepest.linalg.spectral_norm_bound`), or ``"exact"``: slow; an oracle.
        literal: as the original's code: P = QQ, which differs while Q is not yet symmetric; s the same for
            all tensors of a group, ^(−1/4) of their largest mean g²; noise without ε; μ ≥ 0.3 whatever μ₀.
        views: parameter names -> blocks (:mod:`steepest.views`) of fused parameters, each preconditioned
            by itself.
        bucket_bytes: bound on the working memory of matrices that are computed together, in bytes; 2²⁸ by
            default.
        **options: these, and the common ones (:class:`~steepest.CommonOptions`).

    Raises:
        TypeError: an unknown keyword, or parameters that are not tensors.
        ValueError: a value out of range; a view that does not fit its parameter, by name.

    Source: X.-L. Li, "Stochastic Hessian Fittings with Lie Groups", arXiv 2402.11858 (2024), and
    arXiv 2402.04553 (2024), 1512.04202 (2015), 1809.10232 (2018), 2211.04422 (2022); the class and its
    arguments are quad_torch's.

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
