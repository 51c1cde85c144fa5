"""Compute the coefficient sets "minimax_…" of ``steepest.linalg.COEFFICIENTS`` by greedy Remez.

    python benchmarks/minimax_coefficients.py

Each polynomial is the odd minimax approximation of 1 on the band that the polynomials before it leave: by
Chebyshev's theorem the one whose error has k + 1 extrema of equal size and alternating sign, for k
coefficients. Minimax polynomials of the bands left by minimax polynomials are the best composition of their
degrees (Amsel et al., "The Polar Express", arXiv 2505.16932). The first band begins where the last
polynomial's error is ERROR. The upper end of every band is raised by a margin: bfloat16 products push
singular values over it, where a polynomial of high degree leaves 1 fast.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Degrees, and the factor on the upper end of each polynomial's band; the first is the set's ``margin``.
SETS = {
    "minimax_17_17": ((17, 17), (1.02, 1.3)),
    "minimax_9_17_3": ((9, 17, 3), (1.02, 1.15, 1.06)),
    "minimax_17_17_3": ((17, 17, 3), (1.02, 1.35, 1.06)),
}
ERROR = 0.2

Floats = NDArray[np.float64]


def minimax(low: float, high: float, degree: int) -> tuple[Floats, float]:
    """Return the coefficients of σ, σ³, … and the largest |1 − p(σ)| on [low, high], by Remez exchange."""
    terms = (degree + 1) // 2
    powers = 2 * np.arange(terms) + 1
    low = low / high  # on [low, 1], the powers are better conditioned
    grid = np.unique(np.concatenate([np.geomspace(low, 1, 20001), np.linspace(low, 1, 20001)]))
    points = low + (1 - low) * np.sin(np.pi / 2 * np.linspace(0, 1, terms + 1))
    for _ in range(200):
        signs = (-1.0) ** np.arange(terms + 1)
        system = np.column_stack([points[:, None] ** powers, signs])
        *coefficients, error = np.linalg.solve(system, np.ones(terms + 1))
        errors = 1 - grid[:, None] ** powers @ np.array(coefficients)
        lobes = np.split(np.arange(len(grid)), np.flatnonzero(np.diff(np.sign(errors))) + 1)
        extrema = [lobe[np.argmax(np.abs(errors[lobe]))] for lobe in lobes]
        while len(extrema) > terms + 1:
            del extrema[0 if abs(errors[extrema[0]]) < abs(errors[extrema[-1]]) else -1]
        if len(extrema) < terms + 1 or np.array_equal(grid[extrema], points):
            break
        points = grid[extrema]
    return np.array(coefficients) / high**powers, abs(float(error))


def greedy(
    low: float, degrees: tuple[int, ...], margins: tuple[float, ...]
) -> tuple[list[Floats], list[float], float]:
    """Return the polynomials, the upper end of the band of each, and the last one's error."""
    polynomials, tops = [], []
    low, high, error = low / margins[0], 1.0, 0.0
    for number, degree in enumerate(degrees):
        if number:
            low, high = 1 - error, (1 + error) * margins[number]
        coefficients, error = minimax(low, high, degree)
        polynomials.append(coefficients)
        tops.append(high)
    return polynomials, tops, error


def band_start(degrees: tuple[int, ...], margins: tuple[float, ...]) -> float:
    """Return the lower end of the first band for which the last error is ERROR."""
    low, high = np.log(1e-5), np.log(0.5)
    for _ in range(60):
        middle = (low + high) / 2
        if greedy(float(np.exp(middle)), degrees, margins)[2] > ERROR:
            low = middle
        else:
            high = middle
    return float(np.exp(high))


def main() -> None:
    """Print the sets."""
    for name, (degrees, margins) in SETS.items():
        start = band_start(degrees, margins)
        polynomials, tops, error = greedy(start, degrees, margins)
        print(f"{name}: margin {margins[0]}, band [{start:.5f}, 1] -> 1 ± {error:.4f}")
        for coefficients, top in zip(polynomials, tops, strict=True):
            print(f"    top {top:.10g}: ({', '.join(f'{value:.13g}' for value in coefficients)})")


if __name__ == "__main__":
    main()
