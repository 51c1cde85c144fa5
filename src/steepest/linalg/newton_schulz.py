"""The polar factor U Vᵀ of U Σ Vᵀ by matrix products alone: odd polynomials that drive σ to 1."""

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
from steepest.linalg.operand import COMPUTING_DTYPES, require_matrices
from steepest.linalg.product import product
from steepest.linalg.symmetric import mirrored_product

__all__ = ["COEFFICIENTS", "CoefficientSet", "newton_schulz"]

Triple = tuple[float, float, float]
Form = Literal["auto", "plain", "gram"]
Method = Literal["newton_schulz", "svd"]


@dataclass(frozen=True)
class CoefficientSet:
    """The polynomials p(σ) = aσ + bσ³ + cσ⁵ of one Newton–Schulz run, in order.

    Args:
        triples: (a, b, c) of each iteration; at least one, all finite.
        beyond: what a run longer than the table does: "cycle" through it again, or "repeat" its last.
        margin: the factor on the Frobenius norm in the normalization; above 1 it keeps rounding from
            pushing σ out of the interval for which the polynomials were made.
        band: the smallest and largest result of one whole run over σ/‖X‖_F ∈ [1e-3, 1].
        source: where the numbers come from.
        gram_in_bfloat16: whether the Gram form in bfloat16 has been found as accurate as the plain one.

    Raises:
        ValueError: no triples, or one that is not three finite numbers.

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
        """The triples of a run of ``steps`` iterations; None is the whole table.

        Raises:
            ValueError: ``steps`` is not an integer ≥ 1.

        >>> COEFFICIENTS["polar_express"].schedule(7)[-3:]
        ((2.3465, -1.7098, 0.4232), (2.3465, -1.7098, 0.4232), (2.3465, -1.7098, 0.4232))
        """
        if steps is None:
            return self.triples
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"newton_schulz: steps must be None or an integer ≥ 1, got {steps!r}")
        if self.beyond == "repeat":
            return (self.triples + self.triples[-1:] * steps)[:steps]
        return (self.triples * math.ceil(steps / len(self.triples)))[:steps]


def _is_triple(triple: object) -> bool:
    return (
        isinstance(triple, (tuple, list))
        and len(triple) == 3
        and all(isinstance(number, (int, float)) and math.isfinite(number) for number in triple)
    )


_JORDAN = (3.4445, -4.7750, 2.0315)

#: The named coefficient sets: what ``newton_schulz(x, name)`` runs, how far it gets, and its source.
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
    r"""The (approximate) polar factor :math:`U V^\top` of :math:`X = U \Sigma V^\top`.

    .. math::
        X \leftarrow \frac{X}{\|X\|_F + \epsilon}, \qquad
        \text{for each } (a, b, c): \quad R = X X^\top, \quad
        Z = bR + cR^2, \quad X \leftarrow aX + ZX

    which maps every singular value by p(σ) = aσ + bσ³ + cσ⁵ and leaves U and V alone. Tall matrices
    are transposed; X is divided by its largest \|entry\| first, so that ε swallows nothing and scales
    from 1e-30 to 1e30 give the same result in float32. Zero comes out as zero, exactly.

    **Where σ ends** when σ/‖X‖_F was in [1e-3, 1] (smaller ones stay smaller):

    ============= ===== =========== ======================
    coefficients  steps result      more steps
    ============= ===== =========== ======================
    jordan        5     0.47 – 1.20 repeat (one triple)
    quintic       5     0.48 – 1.15 cycle
    polar_express 5     0.85 – 1.14 repeat the last triple
    cans          5     0.88 – 1.12 repeat the last triple
    deepseekv4    10    1.00        repeat the last triple
    ============= ===== =========== ======================

    Run "quintic" for a multiple of 5 steps: its steep first triple sends a σ that has arrived at 1.15
    back to 0.09. "cans" has no margin for rounding: in bfloat16 it reaches 1.5. A custom list cycles.

    **Gram form.** For r×n matrices, r ≪ n, the same polynomials from r×r products, with X read at the
    restarts only: R = XXᵀ, Q = I; each iteration Q ← Q(aI + Z), R ← (aI + Z) R (aI + Z); at the end
    X ← QX. An error in R, unlike one in X, grows by a² per iteration, so R is formed anew from X after
    two iterations, and after every three from there: 5 steps cost 2·(4r²n) + 28r³ flops against
    5·(4r²n + 2r³) of the plain form. In bfloat16 it is formed anew after one iteration, and after every
    two from there, which is as accurate as the plain form: 3·(4r²n) + 22r³ flops. The plain form is the
    same loop restarted at each iteration. R and all r×r products are symmetric, and on a CPU they cost less
    than these numbers say (:func:`~steepest.linalg.gram`).

    Args:
        x: [..., m, n], float16, bfloat16, float32 or float64; any batch dimensions, empty ones too.
        coefficients: a name in :data:`COEFFICIENTS`, a :class:`CoefficientSet`, or a list of (a, b, c).
        steps: iterations ≥ 1. None runs the table once; fewer cut it; more go on as it says.
        dtype: the dtype of the products, the result always being in ``x``'s. None: float64 for float64;
            half precision where the hardware multiplies it faster: on a CUDA device that has bfloat16
            natively (bfloat16 in the plain form; float16 in the Gram form, which then needs fewer
            restarts, and for float16 input), and bfloat16 on a CPU with AVX-512 BF16 or AMX for matrices
            of 128 rows and columns or more; float32 everywhere else. Normalization is in float32 at
            least. In float32 on CUDA, torch's float32 matmul precision applies.
        eps: > 0, relative to the largest \|entry\|. It keeps zero at zero and, by default, is nothing
            beside any other norm.
        form: "plain"; "gram"; or "auto", the one with fewer flops: gram where the longer side is more
            than 1.5 times the shorter (the crossing for any number of steps ≥ 2, and for any restarts);
            in bfloat16 for the named sets but "cans", which overshoots there, and more so by Gram.
        method: "newton_schulz", or "svd" for the exact polar factor in float32 at least, for oracles
            and for parity between devices (the iteration amplifies rounding in near-null directions).
            Singular values below max(m, n)·(machine epsilon)·(the largest) count as zero and stay
            zero. ``coefficients``, ``steps``, ``eps`` and ``form`` are checked but play no part.

    Returns:
        ``x``'s shape and dtype. A matrix with an entry that is not finite comes out all NaN, whatever
        the method; the other matrices of its batch are unaffected.

    Raises:
        TypeError: ``x`` is no tensor of those dtypes.
        ValueError: fewer than two dimensions; an unknown name (the message offers the closest); bad
            triples; ``steps`` < 1; ``eps`` ≤ 0; an unknown dtype, form or method.

    Source: Bernstein and Newhouse, "Old Optimizer, New Norm: An Anthology", arXiv 2409.20325 (2024);
    the coefficients' sources stand in :data:`COEFFICIENTS`. Gram form: Zhang, Amsel, Chen, Dao, "Gram
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
    _require_choice("form", form, get_args(Form))
    _require_choice("method", method, get_args(Method))
    _require_choice("dtype", dtype, (None, *COMPUTING_DTYPES))
    if not eps > 0:
        raise ValueError(f"newton_schulz: eps must be > 0, got {eps!r}")
    table = _coefficient_set(coefficients)
    schedule = table.schedule(steps)
    if x.numel() == 0:
        return x.clone()

    tall = x.shape[-2] > x.shape[-1]
    rows, columns = min(x.shape[-2:]), max(x.shape[-2:])
    # Contiguous: strided operands cost half as much again in each of the products.
    wide = (x.mT if tall else x).reshape(-1, rows, columns).contiguous()
    by_gram = form == "gram" or (form == "auto" and _gram_is_shorter(rows, columns))
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
    """x / (margin·‖x‖_F + ε), divided by the largest |entry| first; all NaN if any entry is not finite.

    In the finest of x's dtype, float32 and ``dtype``.
    """
    x = x.to(torch.promote_types(x.dtype, torch.promote_types(dtype, torch.float32)))
    largest = torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True))
    x = x / torch.where(largest == 0, 1.0, largest)
    # Of the rows first: over two dimensions at once a CPU takes one thread.
    norm: Tensor = torch.linalg.vector_norm(
        torch.linalg.vector_norm(x, dim=-1, keepdim=True), dim=-2, keepdim=True
    )
    return x.div_(margin * norm + eps)


def _iterate(x: Tensor, run: tuple[Triple, ...]) -> Tensor:
    """X ← pₖ(…p₁(X)) from the Gram matrix of X alone: a run of one is the plain form."""
    (a, b, c), *rest = run
    r = mirrored_product(x, x.mT)
    # Polynomials of R commute: all of their products are symmetric.
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
    """The schedule cut where R is formed anew from X.

    Plain: at each iteration. Gram: after 2, 5, 8, …; in bfloat16 after 1, 3, 5, …, since an error of its
    8 bits bears to be magnified once only, and not by the first, steepest triple.
    """
    if not by_gram:
        starts = [*range(len(schedule))]
    elif dtype == torch.bfloat16:
        starts = [0, *range(1, len(schedule), 2)]
    else:
        starts = [0, *range(2, len(schedule), 3)]
    for start, end in zip(starts, [*starts[1:], len(schedule)], strict=True):
        yield schedule[start:end]


def _gram_is_shorter(r: int, n: int) -> bool:
    """Fewer flops: a run of k costs 4r²n + (8k − 6)r³, against k·(4r²n + 2r³), thus for n > 1.5 r."""
    return 2 * n > 3 * r


# Below this many rows a CPU's products are too short for bfloat16 to save what its conversions cost.
_BFLOAT16_FROM = 128


def _computing_dtype(dtype: torch.dtype, device_type: str, by_gram: bool, rows: int) -> torch.dtype:
    """What ``dtype=None`` means, see :func:`newton_schulz`."""
    if dtype == torch.float64:
        return dtype
    if device_type == "cpu":
        return torch.bfloat16 if rows >= _BFLOAT16_FROM and _cpu_multiplies_bfloat16() else torch.float32
    if device_type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    return torch.float16 if by_gram or dtype == torch.float16 else torch.bfloat16


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it (AVX-512 BF16, AMX): elsewhere it is emulated, and slow."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def _exact(x: Tensor) -> Tensor:
    """U Vᵀ over the numerical range of normalized matrices."""
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


def _require_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        known = ", ".join(map(repr, allowed))
        raise ValueError(f"newton_schulz: {name} must be one of {known}, got {value!r}")
