"""Gradients with difficult cases: zeros, reversals, many scales, bursts, and silent elements."""

import torch
from torch import Tensor


def hard_gradients(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[Tensor]:
    """Draw ``steps`` float64 gradients with element scales from 1e-5 to 1e1.

    In each step a tenth of the elements are zero and a tenth reverse the previous gradient. Some elements are
    always zero, some never change sign, and some start late.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def chance(probability: float) -> Tensor:
        return torch.rand(shape, generator=generator) < probability

    scale = 10.0 ** (6 * torch.rand(shape, generator=generator, dtype=torch.float64) - 5)
    mean = draw()
    always_zero, late, one_sign = chance(0.05), chance(0.1), chance(0.1)
    made: list[Tensor] = []
    for t in range(steps):
        g = scale * (mean + draw())
        g = torch.where(one_sign, g.abs(), g)
        if made:
            g = torch.where(chance(0.1), -made[-1], g)
        if t % 17 == 5:
            g = g * 100
        silent = chance(0.1) | always_zero | (late & torch.tensor(t < 10))
        made.append(torch.where(silent, 0.0, g))
    return made


def start(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Draw parameters of magnitude around 1, with some zeros and some near zero."""
    generator = torch.Generator().manual_seed(1000 + seed)
    p = torch.randn(shape, generator=generator, dtype=torch.float64)
    at = torch.rand(shape, generator=generator)
    return torch.where(at < 0.1, 0.0, torch.where(at < 0.3, p * 1e-3, p))
