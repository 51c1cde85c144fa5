"""SGD-SaI: momentum times a scale G measured from a tensor's first gradients."""

import math
import statistics

from reference.descent import Reference


def signal_to_noise(g: list[float], *, eps=1e-8, relative_eps=False, max_scale=10.0) -> float:
    """Return G = ‖g‖₂ / (std(g) + ε), at most max_scale·√d, std unbiased; one element gives at most 1."""
    norm = math.sqrt(math.fsum(x * x for x in g))
    spread = statistics.stdev(g) if len(g) > 1 else 0.0
    if relative_eps:
        eps *= norm / math.sqrt(len(g))
    cap = max_scale * math.sqrt(len(g)) if len(g) > 1 else min(max_scale, 1.0)
    return min(norm / (spread + eps), cap) if spread + eps > 0 else cap


class SGDSaI(Reference):
    """m ← g first, then m ← μm + (1−μ)g;  direction G·m.  A zero or non-finite g does not count as first."""

    def __init__(
        self,
        start,
        *,
        momentum=0.9,
        eps=1e-8,
        weight_decay=1e-2,
        scale="gsnr",
        warmup_batches=1,
        relative_eps=False,
        max_scale=10.0,
        **common,
    ):
        super().__init__(start, weight_decay=weight_decay, **common)
        self.mu, self.scale, self.warmup = momentum, scale, warmup_batches
        self.how = {"eps": eps, "relative_eps": relative_eps, "max_scale": max_scale}
        self.m = [0.0] * len(self.p)
        self.measured: list[float] = []
        self.divisor = 1.0  # the largest G of all tensors, with normalize="max"

    def look(self, gradient, with_l2):
        usable = any(x != 0 for x in gradient) and all(math.isfinite(x) for x in gradient)
        self.first = not self.measured
        if usable and len(self.measured) < self.warmup:
            if self.scale == "none":
                g_snr = 1.0
            elif self.scale == "sqrt_numel":
                g_snr = math.sqrt(len(gradient))
            else:
                g_snr = signal_to_noise(gradient, **self.how)
            self.measured.append(g_snr)

    @property
    def gsnr(self) -> float:
        return statistics.fmean(self.measured) if self.measured else 1.0

    def direction(self, i, g, p):
        self.m[i] = g if self.first else self.mu * self.m[i] + (1 - self.mu) * g
        return self.gsnr / self.divisor * self.m[i]

    def state(self):
        kept = {"measured": float(len(self.measured))} | ({"gsnr": self.gsnr} if self.measured else {})
        return kept | ({"momentum_buffer": self.m} if self.mu != 0 else {})
