"""Gradients that visit what goes wrong: zeros, reversals, many scales, bursts, still elements."""

import torch
from torch import Tensor


def hard_gradients(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[Tensor]:
    """``steps`` gradients in float64: element scales from 1e-5 to 1e1, a tenth of them zero, a tenth the
    last one reversed; some elements always zero, some of one sign, some silent at first."""
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
    """Parameters around 1, some of them zero and some near it."""
    generator = torch.Generator().manual_seed(1000 + seed)
    p = torch.randn(shape, generator=generator, dtype=torch.float64)
    at = torch.rand(shape, generator=generator)
    return torch.where(at < 0.1, 0.0, torch.where(at < 0.3, p * 1e-3, p))
