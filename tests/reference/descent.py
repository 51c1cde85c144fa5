"""The base of the references: p as plain numbers, seven weight-decay formulas, and p ← p − η·direction."""

import math
from collections.abc import Sequence


def sign(x: float) -> float:
    """Return −1, 0 or 1; sign(0) = 0."""
    return 0.0 if x == 0 else math.copysign(1.0, x)


class Reference:
    """Optimize one tensor's elements as Python floats.

    A subclass implements ``direction(i, g, p)`` for element i, which also updates that element's state. It
    may inspect the whole gradient first, in ``look``.
    """

    default_method = "decoupled"

    def __init__(
        self, start: Sequence[float], *, lr, weight_decay=0.0, weight_decay_method=None, maximize=False
    ):
        self.p = [float(x) for x in start]
        self.lr = self.initial_lr = lr
        self.weight_decay = weight_decay
        self.method = weight_decay_method or self.default_method
        self.maximize = maximize
        self.t = 0

    def look(self, gradient: list[float], with_l2: list[float]) -> None:
        """Inspect the whole tensor: the gradient alone, and with λp added if the method is l2."""

    def direction(self, i: int, g: float, p: float) -> float:
        raise NotImplementedError

    def state(self) -> dict[str, list[float] | float]:
        """Return the expected optimizer state by entry name."""
        return {}

    def step(self, gradient: Sequence[float]) -> None:
        self.t += 1
        g = [-float(x) if self.maximize else float(x) for x in gradient]
        seen = (
            [x + self.weight_decay * p for x, p in zip(g, self.p, strict=True)] if self.method == "l2" else g
        )
        self.look(g, seen)
        for i, p in enumerate(self.p):
            d = self.direction(i, seen[i], p)
            self.p[i] = self.after_decay(p, d) - self.lr * d

    def after_decay(self, p: float, d: float) -> float:
        lr, wd = self.lr, self.weight_decay
        if self.method == "decoupled":
            return p - lr * wd * p
        if self.method == "independent":
            return p - wd * p * (lr / self.initial_lr)
        if self.method == "untied":
            return p - wd * p if lr > 0 else p
        if self.method == "palm":
            return p - wd * lr**2 * p
        if self.method == "sign":
            return 0.0 if abs(p) <= lr * wd else p - lr * wd * sign(p)
        if self.method == "cautious":
            return p - lr * wd * p if d * p >= 0 else p
        assert self.method == "l2"
        return p
