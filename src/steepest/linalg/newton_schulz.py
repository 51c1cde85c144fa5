"""Compute the polar factor U Vᵀ of U Σ Vᵀ with matrix products only: odd polynomials drive each σ to 1."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor

from steepest.hyperparameters import near_miss
from steepest.linalg.operand import COMPUTING_DTYPES, require_choice, require_matrices
from steepest.linalg.product import product
from steepest.linalg.symmetric import mirrored_product

__all__ = ["COEFFICIENTS", "CoefficientSet", "newton_schulz"]

Triple = tuple[float, float, float]
Form = Literal["auto", "plain", "gram"]
Method = Literal["newton_schulz", "svd"]


@dataclass(frozen=True)
class CoefficientSet:
    """Hold the polynomials p(σ) = aσ + bσ³ + cσ⁵ of one Newton–Schulz run, in order.

    Args:
        triples: (a, b, c) of each iteration; at least one, all finite.
        beyond: a run longer than the table starts it again ("cycle") or repeats its last triple ("repeat").
        margin: a factor on the Frobenius norm in the normalization; above 1, it keeps rounding errors from
            pushing σ out of the interval for which the polynomials were designed.
        band: smallest and largest singular value after one full run, for σ/‖X‖_F ∈ [1e-3, 1].
        source: the publication of the numbers.
        gram_in_bfloat16: whether tests show the Gram form in bfloat16 to be as accurate as the plain form.

    Raises:
        ValueError: there are no triples, or one of them is not three finite numbers.

    >>> newton = CoefficientSet(triples=((1.5, -0.5, 0.0),))  # the classical cubic
    >>> newton_schulz(torch.eye(2), newton, steps=10)
    tensor([[1., 0.],
            [0., 1.]])
    """

    triples: tuple[Triple, ...]
    beyond: Literal["cycle", "repeat"] = "cycle"
    margin: float = 1.0
    band: tuple[float, float] | None = None
    source: str = ""
    gram_in_bfloat16: bool = False

    def __post_init__(self) -> None:
        if not self.triples or not all(_is_triple(triple) for triple in self.triples):
            raise ValueError(
                f"coefficients must be triples (a, b, c) of finite numbers, got {self.triples!r}"
            )

    def schedule(self, steps: int | None = None) -> tuple[Triple, ...]:
        """Return the triples for a run of ``steps`` iterations; None means the whole table once.

        Raises:
            ValueError: ``steps`` is neither None nor an integer ≥ 1.

        >>> COEFFICIENTS["polar_express"].schedule(7)[-3:]
        ((2.3465, -1.7098, 0.4232), (2.3465, -1.7098, 0.4232), (2.3465, -1.7098, 0.4232))
        """
        if steps is None:
            return self.triples
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"newton_schulz: steps must be None or an integer ≥ 1, got {steps!r}")
        more = self.triples[-1:] if self.beyond == "repeat" else self.triples
        return (self.triples + more * steps)[:steps]


def _is_triple(triple: object) -> bool:
    return (
        isinstance(triple, (tuple, list))
        and len(triple) == 3
        and all(isinstance(number, (int, float)) and math.isfinite(number) for number in triple)
    )


_JORDAN = (3.4445, -4.7750, 2.0315)

#: The named coefficient sets for ``newton_schulz(x, name)``, each with its band and its source.
COEFFICIENTS: Mapping[str, CoefficientSet] = MappingProxyType(
    {
        "jordan": CoefficientSet(
            triples=(_JORDAN,) * 5,
            band=(0.47, 1.20),
            source='Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024)',
            gram_in_bfloat16=True,
        ),
        "quintic": CoefficientSet(
            triples=(
                (4.0848, -6.8946, 2.9270),
                (3.9505, -6.3029, 2.6377),
                (3.7418, -5.5913, 2.3037),
                (2.8769, -3.1427, 1.2046),
                (2.8366, -3.0525, 1.2012),
            ),
            gram_in_bfloat16=True,
            band=(0.48, 1.15),
            source='Cesista, You, Jordan, "Squeezing 1-2% Efficiency Gains Out of Muon by Optimizing the '
            'Newton-Schulz Coefficients" (2025)',
        ),
        "polar_express": CoefficientSet(
            triples=(
                (8.1566, -22.4833, 15.8788),
                (4.0429, -2.8089, 0.5000),
                (3.8917, -2.7725, 0.5061),
                (3.2858, -2.3681, 0.4645),
                (2.3465, -1.7098, 0.4232),
            ),
            beyond="repeat",
            margin=1.02,
            gram_in_bfloat16=True,
            band=(0.85, 1.14),
            source='Amsel, Persson, Musco, Gower, "The Polar Express: Optimal Matrix Sign Methods and Their '
            'Application to the Muon Algorithm", arXiv 2505.16932 (2025)',
        ),
        "cans": CoefficientSet(
            triples=(
                (8.4703, -25.1081, 18.6293),
                (4.1828, -3.1087, 0.5806),
                (3.9619, -2.9541, 0.5630),
                (3.2866, -2.4647, 0.5074),
                (2.2737, -1.6447, 0.4162),
            ),
            beyond="repeat",
            band=(0.88, 1.12),
            source='Grishina, Smirnov, Rakhuba, "Accelerating Newton-Schulz Iteration for Orthogonalization '
            'via Chebyshev-type Polynomials", arXiv 2506.10935 (2025)',
        ),
        "deepseekv4": CoefficientSet(
            triples=(_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2,
            beyond="repeat",
            band=(1.00, 1.00),
            source='DeepSeek-AI, "DeepSeek-V4: Towards Highly Efficient Million-Token Context Intelligence" '
            "(2026): eight fast steps, then two that settle at 1",
            gram_in_bfloat16=True,
        ),
    }
)


def newton_schulz(
    x: Tensor,
    coefficients: str | CoefficientSet | Sequence[Triple] = "quintic",
    steps: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    eps: float = 1e-30,
    form: Form = "auto",
    method: Method = "newton_schulz",
) -> Tensor:
    r"""Compute the approximate polar factor :math:`U V^\top` of :math:`X = U \Sigma V^\top`.

    .. math::
        X \leftarrow \frac{X}{\|X\|_F + \epsilon}, \qquad
        \text{for each } (a, b, c): \quad R = X X^\top, \quad
        Z = bR + cR^2, \quad X \leftarrow aX + ZX

    Each iteration maps every singular value to p(σ) = aσ + bσ³ + cσ⁵ and keeps U and V. Tall matrices are
    transposed first. X is divided by its largest \|entry\| first, so ε never dominates the norm, and inputs
    scaled by 1e-30 to 1e30 give the same result in float32. A zero matrix stays exactly zero.

    **Singular values after a run**, for σ/‖X‖_F in [1e-3, 1] (smaller ones end lower):

    ============= ===== =========== ======================
    coefficients  steps result      more steps
    ============= ===== =========== ======================
    jordan        5     0.47 – 1.20 repeat (one triple)
    quintic       5     0.48 – 1.15 cycle
    polar_express 5     0.85 – 1.14 repeat the last triple
    cans          5     0.88 – 1.12 repeat the last triple
    deepseekv4    10    1.00        repeat the last triple
    ============= ===== =========== ======================

    Run "quintic" for a multiple of 5 steps: its steep first triple maps a σ that has reached 1.15 back to
    0.09. "cans" has no margin for rounding errors: in bfloat16 it reaches 1.5. A custom list cycles.

    **Gram form.** For r×n matrices with r ≪ n, the same polynomials by r×r products: R = XXᵀ, Q = I; in
    each iteration Q ← Q(aI + Z), R ← (aI + Z) R (aI + Z); at the end X ← QX. An error in R grows by a² per
    iteration (an error in X does not), so R is recomputed from X after two iterations, and then after every
    three; in bfloat16 after one, and then after every two, which is as accurate as the plain form. 5 steps
    cost 2·(4r²n) + 28r³ flops (bfloat16: 3·(4r²n) + 22r³), the plain form 5·(4r²n + 2r³). R and all r×r
    products are symmetric, so on a CPU they cost less than these counts (:func:`~steepest.linalg.gram`).

    Args:
        x: [..., m, n], float16, bfloat16, float32 or float64; any batch dimensions, including empty ones.
        coefficients: a name in :data:`COEFFICIENTS`, a :class:`CoefficientSet`, or a list of (a, b, c).
        steps: number of iterations ≥ 1. None runs the table once, and more steps than it has continue as its
            ``beyond`` says.
        dtype: dtype of the products; the result always has ``x``'s dtype. None chooses: float64 for float64;
            on CUDA devices with native bfloat16, bfloat16 in the plain form, and float16 for float16 input
            and in the Gram form, which then needs fewer restarts; bfloat16 on CPUs with AVX-512 BF16 or AMX
            for matrices of at least 128 rows and columns; float32 everywhere else. X is always normalized in
            float32 or better. On CUDA, float32 products follow torch's float32 matmul precision.
        eps: > 0, relative to the largest \|entry\|. It keeps zero at zero; the default is negligible beside
            any other norm.
        form: "plain", "gram", or "auto" for the one with fewer flops: Gram if the longer side is more than
            1.5 times the shorter. In bfloat16, "auto" chooses Gram only for the named sets other than
            "cans", which overshoots more in the Gram form.
        method: "newton_schulz", or "svd" for the exact polar factor in float32 or better, as an oracle and
            for parity between devices (the iteration amplifies rounding errors in near-null directions).
            Singular values below max(m, n)·(machine epsilon)·(the largest) count as zero and stay zero.
            ``coefficients``, ``steps``, ``eps`` and ``form`` are checked but have no effect.

    Returns:
        A tensor of ``x``'s shape and dtype. A matrix with an entry that is not finite becomes all NaN with
        either method; the other matrices of its batch are unaffected.

    Raises:
        TypeError: ``x`` is not a tensor of one of those dtypes.
        ValueError: ``x`` has fewer than two dimensions; the name is unknown (the message suggests the
            closest); a triple is invalid; ``steps`` < 1; ``eps`` ≤ 0; or dtype, form or method is unknown.

    Source: Bernstein and Newhouse, "Old Optimizer, New Norm: An Anthology", arXiv 2409.20325 (2024);
    :data:`COEFFICIENTS` names the source of each set. Gram form: Zhang, Amsel, Chen, Dao, "Gram
    Newton-Schulz" (2026).

    >>> x = torch.tensor([[3.0, 0.0, 0.0], [0.0, -0.5, 0.0]])
    >>> newton_schulz(x, "deepseekv4").round(decimals=2) + 0.0
    tensor([[ 1.,  0.,  0.],
            [ 0., -1.,  0.]])
    >>> newton_schulz(x, "polar_expres")
    Traceback (most recent call last):
        ...
    ValueError: unknown coefficients 'polar_expres' (did you mean 'polar_express'?); known: jordan, quintic,
    polar_express, cans, deepseekv4
    """
    require_matrices("newton_schulz", x)
    require_choice("newton_schulz", "form", form, get_args(Form))
    require_choice("newton_schulz", "method", method, get_args(Method))
    require_choice("newton_schulz", "dtype", dtype, (None, *COMPUTING_DTYPES))
    if not eps > 0:
        raise ValueError(f"newton_schulz: eps must be > 0, got {eps!r}")
    table = _coefficient_set(coefficients)
    schedule = table.schedule(steps)
    if x.numel() == 0:
        return x.clone()

    tall = x.shape[-2] > x.shape[-1]
    rows, columns = min(x.shape[-2:]), max(x.shape[-2:])
    # Strided operands would make each product cost half as much again.
    wide = (x.mT if tall else x).reshape(-1, rows, columns).contiguous()
    # k iterations cost 4r²n + (8k − 6)r³ flops as one Gram run and k·(4r²n + 2r³) in the plain form, so the
    # Gram form needs fewer for n > 1.5 r.
    by_gram = form == "gram" or (form == "auto" and 2 * columns > 3 * rows)
    dtype = dtype or _computing_dtype(x.dtype, x.device.type, by_gram, rows)
    if form == "auto" and dtype == torch.bfloat16 and not table.gram_in_bfloat16:
        by_gram = False
    polar = _normalized(wide, table.margin, eps, dtype)
    if method == "svd":
        polar = _exact(polar)
    else:
        polar = polar.to(dtype)
        for run in _runs(schedule, by_gram, dtype):
            polar = _iterate(polar, run)
    return (polar.mT.contiguous() if tall else polar).reshape(x.shape).to(x.dtype)


def _normalized(x: Tensor, margin: float, eps: float, dtype: torch.dtype) -> Tensor:
    """Return x / (margin·‖x‖_F + ε) in the most precise of x's dtype, float32 and ``dtype``."""
    x = x.to(torch.promote_types(x.dtype, torch.promote_types(dtype, torch.float32)))
    largest = torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True))
    x = x / torch.where(largest == 0, 1.0, largest)
    # Reduce the rows first: torch reduces two dimensions at once on a single CPU thread.
    norm: Tensor = torch.linalg.vector_norm(
        torch.linalg.vector_norm(x, dim=-1, keepdim=True), dim=-2, keepdim=True
    )
    return x.div_(margin * norm + eps)


def _iterate(x: Tensor, run: tuple[Triple, ...]) -> Tensor:
    """Return pₖ(…p₁(X)) from one Gram matrix of X; a run of one iteration is the plain form."""
    (a, b, c), *rest = run
    r = mirrored_product(x, x.mT)
    # Polynomials of R commute, so all products below are symmetric.
    z = mirrored_product(r, r, added=r, alpha=c, beta=b)  # Z = bR + cR²
    if not rest:
        return product(z, x, added=x, beta=a)  # aX + ZX
    q = z.clone()
    q.diagonal(dim1=-2, dim2=-1).add_(a)
    for following in rest:
        r = mirrored_product(r, z, added=r, beta=a)
        r = mirrored_product(r, z, added=r, beta=a)  # (aI + Z) R (aI + Z)
        a, b, c = following
        z = mirrored_product(r, r, added=r, alpha=c, beta=b)
        q = mirrored_product(q, z, added=q, beta=a)  # Q(aI + Z)
    return product(q, x)


def _runs(schedule: tuple[Triple, ...], by_gram: bool, dtype: torch.dtype) -> Iterator[tuple[Triple, ...]]:
    """Split the schedule into runs that start by computing R from X; the plain form has runs of one."""
    if not by_gram:
        starts = [*range(len(schedule))]
    elif dtype == torch.bfloat16:
        # 8 bits tolerate one amplification of a rounding error, but not by the first triple, the steepest.
        starts = [0, *range(1, len(schedule), 2)]
    else:
        starts = [0, *range(2, len(schedule), 3)]
    for start, end in zip(starts, [*starts[1:], len(schedule)], strict=True):
        yield schedule[start:end]


def _computing_dtype(dtype: torch.dtype, device_type: str, by_gram: bool, rows: int) -> torch.dtype:
    if dtype == torch.float64:
        return dtype
    if device_type == "cpu":
        # With fewer rows, converting to bfloat16 costs more time than the faster products save.
        return torch.bfloat16 if rows >= 128 and _cpu_multiplies_bfloat16() else torch.float32
    if device_type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    return torch.float16 if by_gram or dtype == torch.float16 else torch.bfloat16


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    """Return whether this CPU has bfloat16 products (AVX-512 BF16, AMX); without them, emulation is slow."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def _exact(x: Tensor) -> Tensor:
    """Compute U Vᵀ of normalized matrices, leaving out numerically zero singular values."""
    finite = x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    u, s, vt = torch.linalg.svd(torch.where(finite, x, 0.0), full_matrices=False)
    smallest = max(x.shape[-2:]) * torch.finfo(x.dtype).eps * s[..., :1]
    return torch.where(finite, (u * (s > smallest)[..., None, :]) @ vt, math.nan)


def _coefficient_set(coefficients: str | CoefficientSet | Sequence[Triple]) -> CoefficientSet:
    if isinstance(coefficients, CoefficientSet):
        return coefficients
    if not isinstance(coefficients, str):
        return CoefficientSet(tuple(coefficients))
    if coefficients not in COEFFICIENTS:
        raise ValueError(
            f"unknown coefficients {coefficients!r}{near_miss(coefficients, COEFFICIENTS)}; "
            f"known: {', '.join(COEFFICIENTS)}"
        )
    return COEFFICIENTS[coefficients]
