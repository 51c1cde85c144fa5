"""Test that the polynomials of the minimax sets are what Chebyshev's theorem says of the best ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steepest.linalg import COEFFICIENTS

NAMES = ("minimax_17_17", "minimax_9_17_3", "minimax_17_17_3")


def errors(polynomial: tuple[float, ...], low: float, high: float) -> Tensor:
    """Return 1 − p(σ) densely on [low, high]."""
    sigma = torch.linspace(low, high, 400_001, dtype=torch.float64)
    return 1 - sum(number * sigma ** (2 * power + 1) for power, number in enumerate(polynomial))


def extrema(error: Tensor) -> Tensor:
    """Return the extreme value between each two zeros, with its sign."""
    ends = (error.sign().diff() != 0).nonzero().flatten() + 1
    lobes = error.tensor_split(ends.tolist())
    return torch.stack([lobe[lobe.abs().argmax()] for lobe in lobes])


@pytest.mark.parametrize("name", NAMES)
def test_each_polynomial_equioscillates_on_the_band_that_the_others_leave(name):
    """k coefficients and k + 1 errors of one size and alternating signs: no polynomial is nearer to 1."""
    table = COEFFICIENTS[name]
    first = errors(table.polynomials[0], 0, 1)
    size = -first.min().item()
    low = (first <= size).nonzero()[0].item() / (len(first) - 1)
    for number, (polynomial, top) in enumerate(zip(table.polynomials, table.tops, strict=True)):
        if number:
            low = 1 - size
            assert 1.05 * (1 + size) < top < 1.36 * (1 + size)  # room for rounding errors
        found = extrema(errors(polynomial, low, top))
        assert len(found) == len(polynomial) + 1
        assert (found.sign().diff() != 0).all()
        size = found.abs().max().item()
        # The grid does not hit the first band's end exactly, where the polynomial is steep, and tops have six
        # digits.
        assert found.abs().min() > (1 - (1e-3 if number == 0 else 1e-4)) * size
    assert size == pytest.approx(0.2, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_the_degrees(name):
    degrees = [2 * len(polynomial) - 1 for polynomial in COEFFICIENTS[name].polynomials]
    assert name == "_".join(["minimax", *map(str, degrees)])
