"""Muon and its base class in float64, from their equations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reference.descent import Reference


class Orthogonalized(Reference):
    """m ← m + (1−β)(g − m); the direction is a matrix function of u, here the identity."""

    nesterov = False

    def __init__(self, start: Sequence[float], *, shape: tuple[int, int], beta: float = 0.95, **options):
        options.pop("method", None)
        super().__init__(start, **options)
        self.shape, self.beta = shape, beta
        self.m = np.zeros(shape)

    def look(self, gradient: list[float], with_l2: list[float]) -> None:
        g = np.array(with_l2).reshape(self.shape)
        self.m = self.m + (1 - self.beta) * (g - self.m)
        u = g + self.beta * (self.m - g) if self.nesterov else self.m
        self.directions = self.along(u).ravel().tolist()

    def along(self, u: np.ndarray) -> np.ndarray:
        return u

    def direction(self, i: int, g: float, p: float) -> float:
        return self.directions[i]

    def state(self) -> dict[str, list[float]]:
        return {"momentum_buffer": self.m.ravel().tolist()}


class Muon(Orthogonalized):
    """Use the exact direction 0.2·√max(m, n)·polar(u)."""

    nesterov = True

    def along(self, u: np.ndarray) -> np.ndarray:
        left, _, right = np.linalg.svd(u, full_matrices=False)
        return 0.2 * max(self.shape) ** 0.5 * left @ right
