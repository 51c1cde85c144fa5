"""Sign descent: SignGSD, Signum, Lion, Simba and its ablations, Simba-leaky."""

import math
from collections.abc import Callable
from fractions import Fraction

from reference.descent import Reference, sign


class SignGSD(Reference):
    """p ← p − η·sign(g), with sign decay that stops at zero; with overshoot p ← p − η(sign g + λ sign p)."""

    default_method = "sign"

    def __init__(self, start, *, decay_overshoot=False, **common):
        super().__init__(start, **common)
        self.overshoot = decay_overshoot

    def direction(self, i, g, p):
        return sign(g) + (self.weight_decay * sign(p) if self.overshoot else 0.0)

    def after_decay(self, p, d):
        return p if self.overshoot else super().after_decay(p, d)


class Signum(Reference):
    """m ← βm + (1−β)g first; then sign(m)."""

    def __init__(self, start, *, momentum=0.9, **common):
        super().__init__(start, **common)
        self.beta = momentum
        self.m = [0.0] * len(self.p)

    def direction(self, i, g, p):
        self.m[i] = self.beta * self.m[i] + (1 - self.beta) * g
        return sign(self.m[i])

    def state(self):
        return {"momentum_buffer": self.m}


class Lion(Reference):
    """sign(β₁m + (1−β₁)g); then m ← β₂m + (1−β₂)g."""

    def __init__(self, start, *, betas=(0.9, 0.99), **common):
        super().__init__(start, **common)
        self.betas = betas
        self.m = [0.0] * len(self.p)

    def direction(self, i, g, p):
        b1, b2 = self.betas
        d = sign(b1 * self.m[i] + (1 - b1) * g)
        self.m[i] = b2 * self.m[i] + (1 - b2) * g
        return d

    def state(self):
        return {"exp_avg": self.m}


def cutoff(window: int, threshold: float) -> int:
    """Return ⌊wγ⌋, with γ as the decimal number that the user wrote."""
    return math.floor(window * Fraction(repr(threshold)))


class Simba(Reference):
    """The counters from before this gradient decide the direction; then its sign updates them."""

    def __init__(
        self,
        start,
        *,
        window_size=128,
        threshold=0.1,
        memory="counts",
        choice="threshold",
        betas=(0.9, 0.99),
        **common,
    ):
        super().__init__(start, **common)
        self.w, self.cutoff = window_size, cutoff(window_size, threshold)
        self.memory, self.choice, self.betas = memory, choice, betas
        self.s = [0] * len(self.p)
        self.m = [0.0] * len(self.p)

    def direction(self, i, g, p):
        b1, b2 = self.betas
        s, m = self.s[i], self.m[i]
        remembered = sign(s) if self.memory == "counts" else sign(m)
        if self.choice == "memory":
            d = remembered
        elif self.choice == "threshold":
            d = remembered if abs(s) > self.cutoff else sign(g)
        else:
            d = remembered if b1 * abs(m) > (1 - b1) * abs(g) else sign(g)
        self.s[i] = min(self.w, max(-self.w, s + int(sign(g))))
        self.m[i] = b2 * m + (1 - b2) * g
        return d

    def state(self):
        kept = {}
        if self.memory == "counts" or self.choice == "threshold":
            kept["counts"] = self.s
        if self.memory == "momentum" or self.choice == "lion":
            kept["exp_avg"] = self.m
        return kept


def round_up_or_down(x: float, u: float) -> int:
    """Round x so that its expectation is x: up if the uniform u is below x's fractional part."""
    return math.floor(x) + (1 if u < x - math.floor(x) else 0)


class SimbaLeaky(Reference):
    """s ← s − round_s(s·leak) + round_s(8·clip(g/rms(g), −7, 7)); then sign(s).

    ``noise(t, stream)`` returns the uniform numbers of step t for every element: stream 0 rounds the leak,
    stream 1 the addition. rms is the rms of the gradient alone, even if l2 adds λp.
    """

    def __init__(self, start, *, noise: Callable[[int, int], list[float]], leak=0.01, **common):
        super().__init__(start, **common)
        self.noise, self.leak = noise, leak
        self.s = [0] * len(self.p)

    def look(self, gradient, with_l2):
        self.rms = math.sqrt(math.fsum(g * g for g in gradient) / len(gradient))
        self.u = [self.noise(self.t, stream) for stream in (0, 1)]

    def direction(self, i, g, p):
        scaled = min(7.0, max(-7.0, g / self.rms)) if self.rms > 0 else 0.0
        forgotten = round_up_or_down(self.s[i] * self.leak, self.u[0][i])
        self.s[i] = self.s[i] - forgotten + round_up_or_down(8 * scaled, self.u[1][i])
        return sign(self.s[i])

    def state(self):
        return {"counts": self.s}
