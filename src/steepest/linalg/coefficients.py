"""The coefficient sets of Newton-Schulz iterations: odd polynomials that drive singular values to 1."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from steepest.hyperparameters import near_miss
from steepest.linalg.gram_polynomial import DEGREES, Polynomial, factored
from steepest.linalg.minimax import MINIMAX_9_17_3, MINIMAX_17_17, MINIMAX_17_17_3
from steepest.linalg.normalization import Normalization

__all__ = ["COEFFICIENTS", "CoefficientSet", "Triple", "coefficient_set"]

Triple = tuple[float, float, float]

_T = TypeVar("_T")

# Its first two derivatives vanish at 1. A polynomial made for a wide band would end beside 1 if repeated.
_SETTLING: Triple = (1.875, -1.25, 0.375)


@dataclass(frozen=True)
class CoefficientSet:
    """Hold the polynomials of one Newton–Schulz run, in order: p(σ) = aσ + bσ³ + cσ⁵ or of degree 3, 9 or 17.

    Args:
        triples: (a, b, c) of each iteration, if all are of degree 5; at least one, all finite.
        beyond: a run longer than the table starts it again ("cycle"), repeats its last polynomial ("repeat"),
            or brings what it has reached to 1 by (15σ − 10σ³ + 3σ⁵)/8 ("settle"), whose error near 1
            is 2.5 times the cube of the last one.
        margin: a factor on the norm in the normalization; above 1, it keeps rounding errors from pushing σ
            out of the interval for which the polynomials were designed.
        band: smallest and largest singular value after one full run, for σ/‖X‖ ∈ [1e-3, 1] in the norm of
            the normalization.
        source: the publication of the numbers.
        gram_in_bfloat16: whether tests show the Gram form in bfloat16 to be as accurate as the plain form.
        first_run: iterations of the Gram form in bfloat16 from the first R; all later runs take two. Errors
            of R grow by a² in each, and the runs that follow make up for those of the first.
        polynomials: (a, b, …) of each iteration, 2, 3, 5 or 9 numbers; given triples, the same.
        tops: for each polynomial, the largest σ for which it was made; () means 1. Products are formed of
            R/top², which keeps rounding errors of high degrees small.
        normalization: the norm by which X is divided, unless :func:`~steepest.linalg.newton_schulz` is
            called with another.
        half_precision: whether products may be in half precision; float32 is the default otherwise.

    Raises:
        ValueError: there are no polynomials, one of them is not 2, 3, 5 or 9 finite numbers, or not three
            among the triples; there are other triples than polynomials; there are not as many tops; or a
            polynomial of degree 17 has no form of three products.

    >>> import torch
    >>> from steepest.linalg import newton_schulz
    >>> newton = CoefficientSet(polynomials=((1.5, -0.5),))  # the classical cubic
    >>> newton_schulz(torch.eye(2), newton, steps=10)
    tensor([[1., 0.],
            [0., 1.]])
    """

    triples: tuple[Triple, ...] = ()
    beyond: Literal["cycle", "repeat", "settle"] = "cycle"
    margin: float = 1.0
    band: tuple[float, float] | None = None
    source: str = ""
    gram_in_bfloat16: bool = False
    first_run: int = 1
    polynomials: tuple[Polynomial, ...] = ()
    tops: tuple[float, ...] = ()
    normalization: Normalization = "frobenius"
    half_precision: bool = True

    def __post_init__(self) -> None:
        if self.triples:
            if self.polynomials not in ((), self.triples):
                raise ValueError("coefficients: give either triples or polynomials")
            object.__setattr__(self, "polynomials", self.triples)
        lengths: Container[int] = (3,) if self.triples else DEGREES
        if not self.polynomials or not all(_is_polynomial(each, lengths) for each in self.polynomials):
            raise ValueError(
                "coefficients must be triples (a, b, c) of finite numbers, or tuples of 2, 5 or 9 for the "
                f"degrees 3, 9 and 17, got {self.polynomials!r}"
            )
        if self.tops and not (len(self.tops) == len(self.polynomials) and min(self.tops) > 0):
            raise ValueError(f"coefficients: tops must be positive, one per polynomial, got {self.tops!r}")
        for polynomial in self.polynomials:
            if len(polynomial) == 9:
                _require_factors(polynomial)

    def schedule(self, steps: int | None = None) -> tuple[Polynomial, ...]:
        """Return the polynomials for a run of ``steps`` iterations; None means the whole table once.

        Raises:
            ValueError: ``steps`` is neither None nor an integer ≥ 1.

        >>> COEFFICIENTS["polar_express"].schedule(7)[-3:]
        ((2.3465, -1.7098, 0.4232), (1.875, -1.25, 0.375), (1.875, -1.25, 0.375))
        """
        return self.polynomials if steps is None else self._continued(self.polynomials, steps, _SETTLING)

    def scaled_schedule(self, steps: int | None = None) -> tuple[Polynomial, ...]:
        """Return the polynomials for a run in which each one has the interval [0, 1].

        p̂ᵢ(σ) = pᵢ(topᵢ σ) / topᵢ₊₁; the first top must be 1, and the last polynomial is divided by nothing.

        >>> CoefficientSet(polynomials=((3.0, -2.0), (1.5, -0.5)), tops=(1.0, 2.0)).scaled_schedule()
        ((1.5, -1.0), (3.0, -4.0))
        """
        if not self.tops:
            return self.polynomials if steps is None else self.schedule(steps)
        tops = self.tops if steps is None else self._continued(self.tops, steps, 1.0)
        return tuple(
            tuple(value * top ** (2 * power + 1) / following for power, value in enumerate(polynomial))
            for polynomial, top, following in zip(self.schedule(steps), tops, (*tops[1:], 1.0), strict=True)
        )

    def _continued(self, table: tuple[_T, ...], steps: int, settling: _T) -> tuple[_T, ...]:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"newton_schulz: steps must be None or an integer ≥ 1, got {steps!r}")
        more = {"repeat": table[-1:], "settle": (settling,), "cycle": table}[self.beyond]
        return (table + more * steps)[:steps]


def _is_polynomial(polynomial: object, lengths: Container[int]) -> bool:
    return (
        isinstance(polynomial, (tuple, list))
        and len(polynomial) in lengths
        and all(isinstance(number, (int, float)) and math.isfinite(number) for number in polynomial)
    )


def _require_factors(polynomial: Polynomial) -> None:
    try:
        factored(polynomial)
    except ZeroDivisionError:
        raise ValueError(f"coefficients: {polynomial!r} has no form of three products") from None


_MINIMAX: dict[str, Any] = {
    "beyond": "settle",
    "margin": 1.02,
    "normalization": "schatten8",
    "gram_in_bfloat16": True,
    "source": "greedy Remez, benchmarks/minimax_coefficients.py, after Amsel et al., arXiv 2505.16932",
}

_JORDAN = (3.4445, -4.7750, 2.0315)

#: The named coefficient sets for ``newton_schulz(x, name)``, each with its band and its source.
COEFFICIENTS: Mapping[str, CoefficientSet] = MappingProxyType(
    {
        "jordan": CoefficientSet(
            triples=(_JORDAN,) * 5,
            band=(0.47, 1.20),
            source='Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024)',
            gram_in_bfloat16=True,
            first_run=3,
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
            beyond="settle",
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
            beyond="settle",
            # In bfloat16, singular values of ordinary matrices grew to 10⁸ (5×9) and 2 (128×512).
            half_precision=False,
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
        "minimax_17_17": CoefficientSet(
            polynomials=MINIMAX_17_17.polynomials,
            tops=MINIMAX_17_17.tops,
            band=(0.14, 1.20),
            **_MINIMAX,
        ),
        "minimax_9_17_3": CoefficientSet(
            polynomials=MINIMAX_9_17_3.polynomials,
            tops=MINIMAX_9_17_3.tops,
            band=(0.20, 1.20),
            **_MINIMAX,
        ),
        "minimax_17_17_3": CoefficientSet(
            polynomials=MINIMAX_17_17_3.polynomials,
            tops=MINIMAX_17_17_3.tops,
            band=(0.32, 1.20),
            **_MINIMAX,
        ),
    }
)


def coefficient_set(coefficients: str | CoefficientSet | Sequence[Polynomial]) -> CoefficientSet:
    """Return the named set, the set itself, or a set of these polynomials."""
    if isinstance(coefficients, CoefficientSet):
        return coefficients
    if not isinstance(coefficients, str):
        return CoefficientSet(polynomials=tuple(coefficients))
    if coefficients not in COEFFICIENTS:
        raise ValueError(
            f"unknown coefficients {coefficients!r}{near_miss(coefficients, COEFFICIENTS)}; "
            f"known: {', '.join(COEFFICIENTS)}"
        )
    return COEFFICIENTS[coefficients]
