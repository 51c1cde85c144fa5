"""Compute the polar factor U Vᵀ of U Σ Vᵀ with matrix products only: odd polynomials drive each σ to 1."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from steepest.linalg.coefficients import CoefficientSet, Triple, coefficient_set
from steepest.linalg.gram_polynomial import Polynomial, without_constant
from steepest.linalg.newton_schulz_ways import Form, Iterations, Way, choose_way, runs_of
from steepest.linalg.normalization import Normalization, frobenius, magnitude, normalized_gram
from steepest.linalg.operand import COMPUTING_DTYPES, require_choice, require_matrices
from steepest.linalg.product import differentiated, is_free, product
from steepest.linalg.symmetric import mirrored_product

__all__ = ["newton_schulz", "newton_schulz_way"]

Method = Literal["newton_schulz", "svd"]

# Norms whose squares neither overflow nor underflow, and an ε that cannot be told from 0 beside them.
_SAFE = (2.0**-40, 2.0**40)
_NEGLIGIBLE = 1e-20

# Elements of a matrix from which results take memory that is there instead of new pages.
_REUSED = 1 << 16


def newton_schulz(
    x: Tensor,
    coefficients: str | CoefficientSet | Sequence[Polynomial] = "quintic",
    steps: int | None = None,
    *,
    normalization: Normalization | None = None,
    dtype: torch.dtype | None = None,
    eps: float = 1e-30,
    form: Form = "auto",
    method: Method = "newton_schulz",
    out: Tensor | None = None,
) -> Tensor:
    r"""Compute the approximate polar factor :math:`U V^\top` of :math:`X = U \Sigma V^\top`.

    .. math::
        X \leftarrow \frac{X}{\|X\| + \epsilon}, \qquad
        \text{for each polynomial } (a, b, c, \ldots): \quad R = X X^\top, \quad
        Z = bR + cR^2 + \ldots, \quad X \leftarrow aX + ZX

    Each iteration maps every singular value to p(σ) = aσ + bσ³ + cσ⁵ + … and keeps U and V. Tall matrices are
    transposed first. X is divided by a power of two near its largest \|entry\| first, unless all squares are
    safe without that, so ε never dominates the norm, and inputs scaled by 1e-30 to 1e30 give the same result
    in float32. A zero matrix stays exactly zero.

    **Singular values after a run**, for σ/‖X‖ in [1e-3, 1] (smaller ones end lower):

    =============== ========== =========== ============ ============================
    coefficients    degrees    result      norm         more steps
    =============== ========== =========== ============ ============================
    jordan          5 times 5  0.47 – 1.20 frobenius    repeat (one triple)
    quintic         5 times 5  0.48 – 1.15 frobenius    cycle
    polar_express   5 times 5  0.85 – 1.14 frobenius    settle at 1
    cans            5 times 5  0.88 – 1.12 frobenius    settle at 1
    deepseekv4      10 times 5 1.00        frobenius    repeat the last triple
    minimax_17_17   17, 17     0.14 – 1.20 schatten8    settle at 1
    minimax_9_17_3  9, 17, 3   0.20 – 1.20 schatten8    settle at 1
    minimax_17_17_3 17, 17, 3  0.32 – 1.20 schatten8    settle at 1
    =============== ========== =========== ============ ============================

    Steps that settle apply (15σ − 10σ³ + 3σ⁵)/8; two after "polar_express" or "cans" leave 1e-6, and six
    after a "minimax" set.

    Run "quintic" for a multiple of 5 steps: its steep first triple maps a σ that has reached 1.15 back to
    0.09. "cans" overflows in half precision, so that its products are in float32. A custom list cycles.

    **High degrees.** An iteration of degree 3, 5, 9 or 17 needs two products with X or Xᵀ, and 0, 1, 2 or 3
    of r×r matrices. The "minimax" sets bring σ/‖X‖ ≥ 0.0062, 0.0043 and 0.0027 to [0.8, 1.2] with fewer
    products than "jordan". `docs/newton_schulz.md` compares errors and times.

    **Normalization.** The Frobenius norm exceeds the spectral norm by a factor of up to √r, which costs
    iterations. (Σσ⁴)^¼ and (Σσ⁸)^⅛ are closer, and come from R and R², which the first iteration computes.

    **Gram form.** For r×n matrices with r ≪ n, the same polynomials by r×r products: R = XXᵀ, Q = I; in
    each iteration Q ← Q(aI + Z), R ← (aI + Z) R (aI + Z); at the end X ← QX. An error in R grows by a² per
    iteration (an error in X does not), so R is recomputed from X after two iterations, and then after every
    three; in bfloat16 after one, and then after every two, which is as accurate as the plain form; in half
    precision before each polynomial of degree 9 or 17, which amplify more. 5 steps of degree 5
    cost 2·(4r²n) + 28r³ flops (bfloat16: 3·(4r²n) + 22r³), the plain form 5·(4r²n + 2r³). R and all r×r
    products are symmetric, so on a CPU they cost less than these counts (:func:`~steepest.linalg.gram`).

    Args:
        x: [..., m, n], float16, bfloat16, float32 or float64; any batch dimensions, including empty ones.
        coefficients: a name in :data:`COEFFICIENTS`, a :class:`CoefficientSet`, or a list of polynomials
            (a, b, c) or of 2, 5 or 9 numbers.
        steps: number of iterations ≥ 1. None runs the table once, and more steps than it has continue as its
            ``beyond`` says.
        normalization: the norm by which X is divided: "frobenius", "schatten4" (Σσ⁴)^¼, "schatten8"
            (Σσ⁸)^⅛, or None for the set's own, the table's "norm" and "frobenius" for a custom list. "aol"
            divides each row (of the shorter side) by the square root of the sum of R's \|entries\| in its
            row. The result is then the polar factor of other rows: it is biased, by 0.1 to 0.4 per singular
            direction on momenta of language models, and not equivariant under rotations of the rows.
        dtype: dtype of the products; the result always has ``x``'s dtype. None chooses: float64 for float64;
            on CUDA devices with native bfloat16, for matrices of at least 32 rows and columns, bfloat16 in
            the plain form, and float16 for float16 input and in the Gram form, which then needs fewer
            restarts; bfloat16 on CPUs with AVX-512 BF16 or AMX for matrices of at least 128 rows and columns;
            float32 everywhere else. X is always normalized in float32 or better. On CUDA, float32 products
            follow torch's float32 matmul precision.
        eps: > 0, relative to about the largest \|entry\|. It keeps zero at zero; the default is negligible
            beside any other norm.
        form: "plain", "gram", or "auto" for the one with fewer flops: Gram if the longer side is more than
            1.5 times the shorter. In bfloat16, "auto" chooses Gram only for the named sets.
        method: "newton_schulz", or "svd" for the exact polar factor in float32 or better, as an oracle and
            for parity between devices (the iteration amplifies rounding errors in near-null directions).
            Singular values below max(m, n)·(machine epsilon)·(the largest) count as zero and stay zero.
            ``coefficients``, ``steps``, ``eps`` and ``form`` are checked but have no effect.

        out: a tensor of ``x``'s shape, dtype and device that the result is written to and that is returned;
            it may be ``x`` itself.

    Returns:
        A tensor of ``x``'s shape and dtype. A matrix with an entry that is not finite becomes all NaN with
        either method; the other matrices of its batch are unaffected.

    Raises:
        TypeError: ``x`` is not a tensor of one of those dtypes.
        RuntimeError: ``out`` where autograd needs a derivative.
        ValueError: ``x`` has fewer than two dimensions; the name is unknown (the message suggests the
            closest); a polynomial is invalid; ``steps`` < 1; ``eps`` ≤ 0; normalization, dtype, form or
            method is unknown; or "cans" in half precision.

    Source: Bernstein and Newhouse, "Old Optimizer, New Norm: An Anthology", arXiv 2409.20325 (2024);
    :data:`COEFFICIENTS` names the source of each set. Gram form: Zhang, Amsel, Chen, Dao, "Gram
    Newton-Schulz" (2026). "aol": Boissin et al., "Turbo-Muon", arXiv 2512.04632 (2025).

    >>> x = torch.tensor([[3.0, 0.0, 0.0], [0.0, -0.5, 0.0]])
    >>> newton_schulz(x, "deepseekv4").round(decimals=2) + 0.0
    tensor([[ 1.,  0.,  0.],
            [ 0., -1.,  0.]])
    >>> newton_schulz(x, "polar_expres")
    Traceback (most recent call last):
        ...
    ValueError: unknown coefficients 'polar_expres' (did you mean 'polar_express'?); known: jordan, quintic,
    polar_express, cans, deepseekv4, minimax_17_17, minimax_9_17_3, minimax_17_17_3
    """
    require_matrices("newton_schulz", x)
    require_choice("newton_schulz", "form", form, get_args(Form))
    require_choice("newton_schulz", "method", method, get_args(Method))
    require_choice("newton_schulz", "dtype", dtype, (None, *COMPUTING_DTYPES))
    if normalization is not None:
        require_choice("newton_schulz", "normalization", normalization, get_args(Normalization))
    if not eps > 0:
        raise ValueError(f"newton_schulz: eps must be > 0, got {eps!r}")
    if out is not None and (out is not x or (x.requires_grad and torch.is_grad_enabled())):
        _check_out(x, out)
    table = coefficient_set(coefficients)
    dtype = _allowed(dtype, table, x.dtype)
    schedule = table.scaled_schedule(steps)
    if x.numel() == 0:
        return x.clone() if out is None else out

    stack = x.reshape(-1, *x.shape[-2:])
    plan = Iterations(schedule, normalization or table.normalization, table.margin, table.first_run)
    way = choose_way(stack, plan, form, dtype, table.gram_in_bfloat16, _iterated)
    # A matrix that the caller gives away is scaled in its own memory.
    margin = table.margin if plan.normalization == "frobenius" else 1.0
    polar = _normalized(stack, margin, eps, way.dtype, donated=out is x)
    polar = _exact(polar) if method == "svd" else _iterated(polar, plan, way)
    polar = polar.reshape(x.shape)
    return polar.to(x.dtype) if out is None else out.copy_(polar)


def newton_schulz_way(
    shape: Sequence[int],
    coefficients: str | CoefficientSet | Sequence[Triple] = "quintic",
    steps: int | None = None,
    *,
    operand_dtype: torch.dtype,
    device: torch.device,
    normalization: Normalization | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Return in words how :func:`newton_schulz` computes matrices of this shape; nothing is timed.

    >>> newton_schulz_way((64, 32), operand_dtype=torch.float32, device=torch.device("cpu"))
    'gram float32'
    """
    table = coefficient_set(coefficients)
    plan = Iterations(
        table.scaled_schedule(steps), normalization or table.normalization, table.margin, table.first_run
    )
    x = torch.empty((), dtype=operand_dtype, device=device).expand(1, *shape[-2:])
    dtype = _allowed(dtype, table, operand_dtype)
    return choose_way(x, plan, "auto", dtype, table.gram_in_bfloat16, None).words


def _allowed(
    dtype: torch.dtype | None, table: CoefficientSet, operand_dtype: torch.dtype
) -> torch.dtype | None:
    """Return the dtype of the products, or None for one that the processor is good at."""
    if table.half_precision:
        return dtype
    if dtype is not None and dtype.itemsize == 2:
        raise ValueError(f"newton_schulz: products with these coefficients overflow in {dtype}; use float32")
    return dtype or torch.promote_types(operand_dtype, torch.float32)


def _check_out(x: Tensor, out: Tensor) -> None:
    require_matrices("newton_schulz", out)
    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"newton_schulz: out must be of x's shape, dtype and device, {tuple(x.shape)}, {x.dtype} and "
            f"{x.device}, got {tuple(out.shape)}, {out.dtype} and {out.device}"
        )
    if differentiated(x, out):
        raise RuntimeError("newton_schulz: out= has no derivative: leave it out, or use torch.no_grad()")


def _normalized(x: Tensor, margin: float, eps: float, dtype: torch.dtype, donated: bool) -> Tensor:
    """Return x / (margin·‖x‖_F + ε) in the most precise of x's dtype, float32 and ``dtype``.

    ``donated`` says that x may be overwritten.
    """
    precise = torch.promote_types(x.dtype, torch.promote_types(dtype, torch.float32))
    donated = donated or x.dtype != precise
    x = x.to(precise)
    if x.is_cpu and x[0].numel() >= _REUSED and eps <= _NEGLIGIBLE and is_free(x, x, None):
        # A look at the norms, which a device would have to be waited for, saves two passes.
        norm = frobenius(x)
        low, high = map(float, norm.aminmax())
        if _SAFE[0] < low and high < _SAFE[1]:
            return x.div_(norm.mul_(margin)) if donated else x / norm.mul_(margin)
    scale = magnitude(x)
    x = x.div_(scale) if donated else x / scale
    norm = margin * frobenius(x) + eps
    # The norm's derivative needs x.
    return x / norm if x.requires_grad and torch.is_grad_enabled() else x.div_(norm)


def _iterated(x: Tensor, plan: Iterations, way: Way) -> Tensor:
    """Run all iterations on matrices [b, m, n] of Frobenius norm ≤ 1, in the way's dtype."""
    wide = way.turned or x.shape[-2] <= x.shape[-1]
    x = (x.mT if way.turned else x).to(way.dtype, memory_format=torch.contiguous_format).contiguous()
    # Small results are allocated faster than they are found.
    reuses = x[0].numel() >= _REUSED and is_free(x, x, None)
    kept = None if reuses else 0
    squares: deque[Tensor] = deque(maxlen=kept)
    others: deque[Tensor] = deque(maxlen=kept)
    runs = runs_of(plan, way.by_gram, way.dtype)
    norm = None if plan.normalization == "frobenius" else (plan.normalization, plan.margin)
    for number, run in enumerate(runs, 1):
        x = _iterate(x, run, wide, way.turned and number == len(runs), squares, others, norm)
        norm = None
    return x


def _iterate(
    x: Tensor,
    run: tuple[Polynomial, ...],
    wide: bool,
    turns: bool,
    squares: deque[Tensor],
    others: deque[Tensor],
    norm: tuple[Normalization, float] | None,
) -> Tensor:
    """Return pₖ(…p₁(X)) from one Gram matrix R of X; a run of one iteration is the plain form.

    Args:
        x: [b, r, n], or [b, n, r] if not ``wide``; its memory may be used again.
        run: the iterations, each X ← q(R) X.
        wide: whether the rows are the shorter side.
        turns: return the transpose of what has x's shape.
        squares, others: memory to be used again, for results of R's shape and of x's.
        norm: X is divided by this norm times this margin first; None does nothing.
    """
    polynomial, *rest = run
    flat = x if wide else x.mT
    r = mirrored_product(flat, flat.mT, out=squares.pop() if squares else None)
    d = powers = None
    if norm is not None:
        r, d, powers = normalized_gram(r, *norm)
    # Polynomials of R commute, so all products but the last are symmetric.
    a, z = polynomial[0], without_constant(polynomial, r, squares, powers)
    out = others.pop() if others else None
    if turns and out is not None:
        out = out.view(x.mT.shape)
    if not rest and d is None:
        squares += (r, z)
        others.append(x)
        if turns:
            return product(x.mT, z, added=x.mT, beta=a, out=out)
        return product(*((z, x) if wide else (x, z)), added=x, beta=a, out=out)  # aX + ZX
    q = z.clone()
    q.diagonal(dim1=-2, dim2=-1).add_(a)
    for following in rest:
        rw = mirrored_product(r, z, added=r, beta=a, out=squares.pop() if squares else None)
        squares.append(r)
        r = mirrored_product(rw, z, added=rw, beta=a, out=squares.pop() if squares else None)  # W R W
        squares += (rw, z)
        a, z = following[0], without_constant(following, r, squares)
        qw = mirrored_product(q, z, added=q, beta=a, out=squares.pop() if squares else None)  # Q (aI + Z)
        squares.append(q)
        q = qw
    squares += (r, z, q)
    others.append(x)
    # Rounding leaves Q slightly asymmetric. With high degrees the side matters: X must meet the last factor
    # of Q first, as in Q X; the other order ends with singular values of 1.7 instead of 1.25 in bfloat16.
    transposed = q if d is None and len(polynomial) == 3 else q.mT
    if d is not None:
        q, transposed = q * d.mT, transposed * d
    if turns:
        return product(x.mT, transposed, out=out)
    return product(*((q, x) if wide else (x, transposed)), out=out)


def _exact(x: Tensor) -> Tensor:
    """Compute U Vᵀ of normalized matrices, leaving out numerically zero singular values."""
    finite = x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    u, s, vt = torch.linalg.svd(torch.where(finite, x, 0.0), full_matrices=False)
    smallest = max(x.shape[-2:]) * torch.finfo(x.dtype).eps * s[..., :1]
    return torch.where(finite, (u * (s > smallest)[..., None, :]) @ vt, math.nan)
