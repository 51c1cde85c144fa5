"""The coefficient sets of Newton-Schulz iterations: odd polynomials that drive singular values to 1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from steepest.hyperparameters import near_miss

__all__ = ["COEFFICIENTS", "CoefficientSet", "Triple", "coefficient_set"]

Triple = tuple[float, float, float]


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

    >>> import torch
    >>> from steepest.linalg import newton_schulz
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


def coefficient_set(coefficients: str | CoefficientSet | Sequence[Triple]) -> CoefficientSet:
    """Return the named set, the set itself, or a set of these triples."""
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
