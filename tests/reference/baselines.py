"""SGD with momentum and AdamW, as documented by torch, and AdEMAMix from its paper."""

import math

from reference.descent import Reference


class SGD(Reference):
    """b ← g first, then b ← μb + (1−τ)g;  p ← p − η·b, with Nesterov p − η(g + μb)."""

    default_method = "l2"

    def __init__(self, start, *, momentum=0.0, dampening=0.0, nesterov=False, **common):
        super().__init__(start, **common)
        self.mu, self.tau, self.nesterov = momentum, dampening, nesterov
        self.b = [0.0] * len(self.p)

    def direction(self, i, g, p):
        if self.mu == 0:
            return g
        self.b[i] = g if self.t == 1 else self.mu * self.b[i] + (1 - self.tau) * g
        return g + self.mu * self.b[i] if self.nesterov else self.b[i]

    def state(self):
        return {"momentum_buffer": self.b} if self.mu != 0 else {}


class AdamW(Reference):
    """Two bias-corrected averages; AMSGrad keeps the maximum of the second."""

    def __init__(self, start, *, betas=(0.9, 0.999), eps=1e-8, amsgrad=False, weight_decay=1e-2, **common):
        super().__init__(start, weight_decay=weight_decay, **common)
        self.betas, self.eps, self.amsgrad = betas, eps, amsgrad
        self.m, self.v, self.largest = ([0.0] * len(self.p) for _ in range(3))

    def direction(self, i, g, p):
        b1, b2 = self.betas
        self.m[i] = b1 * self.m[i] + (1 - b1) * g
        self.v[i] = b2 * self.v[i] + (1 - b2) * g * g
        self.largest[i] = max(self.largest[i], self.v[i])
        second = self.largest[i] if self.amsgrad else self.v[i]
        unbiased = math.sqrt(second / (1 - b2**self.t))
        return self.m[i] / (1 - b1**self.t) / (unbiased + self.eps) if self.m[i] != 0 else 0.0

    def state(self):
        kept = {"exp_avg": self.m, "exp_avg_sq": self.v, "step": float(self.t)}
        return kept | ({"max_exp_avg_sq": self.largest} if self.amsgrad else {})


class AdEMAMix(Reference):
    """Algorithm 1 of arXiv 2409.03137, its schedulers as defined in section 3; T is ``t_alpha_beta3``."""

    def __init__(
        self,
        start,
        *,
        betas=(0.9, 0.999, 0.9999),
        alpha=5.0,
        eps=1e-8,
        t_alpha_beta3=None,
        weight_decay=1e-2,
        **common,
    ):
        super().__init__(start, weight_decay=weight_decay, **common)
        self.betas, self.alpha, self.eps, self.warmup = betas, alpha, eps, t_alpha_beta3
        self.m1, self.m2, self.nu = ([0.0] * len(self.p) for _ in range(3))

    def alpha_t(self):
        return self.alpha if self.warmup is None else min(self.t * self.alpha / self.warmup, self.alpha)

    def beta3_t(self):
        b1, _, b3 = self.betas
        if self.warmup is None:
            return b3
        at = self.t / self.warmup
        start, end = math.log(b1), math.log(b3)
        return min(math.exp(start * end / ((1 - at) * end + at * start)), b3) if at < 1 else b3

    def direction(self, i, g, p):
        b1, b2, _ = self.betas
        b3 = self.beta3_t()
        self.m1[i] = b1 * self.m1[i] + (1 - b1) * g
        self.m2[i] = b3 * self.m2[i] + (1 - b3) * g
        self.nu[i] = b2 * self.nu[i] + (1 - b2) * g * g
        mixed = self.m1[i] / (1 - b1**self.t) + self.alpha_t() * self.m2[i]
        return mixed / (math.sqrt(self.nu[i] / (1 - b2**self.t)) + self.eps) if mixed != 0 else 0.0

    def state(self):
        return {"exp_avg": self.m1, "exp_avg_slow": self.m2, "exp_avg_sq": self.nu, "step": float(self.t)}
