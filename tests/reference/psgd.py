"""QUAD and Procrustes for one tensor in numpy, from their equations, with exact norms and no noise."""

import math

import numpy as np


def merged(shape):
    """Return (n,), or the first contiguous split (m, n) with the least max(m, n)/min(m, n)."""
    numel = math.prod(shape)
    if len(shape) < 2 or numel == max(shape):
        return (numel,)
    best = None
    for at in range(1, len(shape)):
        m, n = math.prod(shape[:at]), math.prod(shape[at:])
        if best is None or max(m, n) / min(m, n) < max(best) / min(best):
            best = (m, n)
    return best


def rotate(q):
    """Take one step toward the orthogonal Procrustes solution, which makes Q symmetric."""
    r = q.T - q
    largest = np.abs(r).max()
    if largest <= np.finfo(np.float64).tiny:
        return q
    r = r / largest
    rq = r @ q
    rrq = r @ rq
    if np.trace(rq) <= 0:
        return q
    a = (1 / 8) / np.linalg.norm(r, 2)
    if np.trace(rrq) < 0:
        a = min(a, -np.trace(rq) / np.trace(rrq))
    return q + a * (rq + 0.5 * a * rrq)


class PSGD:
    """Run ``quad`` or ``procrustes`` on one tensor; ``p`` and the one or two factors ``q`` are arrays."""

    def __init__(
        self,
        kind,
        start,
        *,
        lr=0.001,
        lr_style="adam",
        momentum=0.95,
        weight_decay=0.1,
        max_size_dense=16384,
        max_skew_dense=1.0,
        preconditioner_lr=0.7,
        preconditioner_init_scale=None,
        whiten="momentum",
        literal=False,
        balance_every=100,
        fits=lambda t: True,
    ):
        self.kind, self.p = kind, np.array(start, dtype=np.float64)
        self.lr, self.divisor = lr, 5 if lr_style == "adam" else 1
        self.beta, self.decay = momentum, weight_decay
        self.rate, self.start_scale = preconditioner_lr, preconditioner_init_scale
        self.whiten, self.literal, self.fits = whiten, literal, fits
        self.balance_every = balance_every
        self.shape = merged(self.p.shape)
        numel = math.prod(self.shape)
        self.dense = [
            len(self.shape) == 2 and s <= max_size_dense and s**2 <= max_skew_dense * numel
            for s in self.shape
        ]
        self.q = self.m = None
        self.bounds = [0.0 for _ in self.shape]
        self.t = 0

    def preconditioners(self):
        """Return P of each side as a full matrix."""
        made = []
        for q, dense in zip(self.q, self.dense, strict=True):
            whole = q if dense else np.diag(q)
            made.append(whole @ whole if self.kind == "quad" or self.literal else whole.T @ whole)
        return made

    def white(self, x):
        """Return P_l X P_r."""
        p = self.preconditioners()
        return p[0] @ x @ p[1] if len(p) == 2 else p[0] @ x

    def moved(self, side, t, c, eta):
        """Return the factor of one side after its step."""
        q = self.q[side]
        length = c + (np.linalg.norm(t, 2) if self.dense[side] else t.max())
        self.bounds[side] = max(0.95 * self.bounds[side] + 0.05 * length, length)
        eta = eta / self.bounds[side]
        if not self.dense[side]:
            return q * (1 - eta / 2 * (t - c)) ** 2 if self.kind == "quad" else q * (1 - eta * (t - c))
        if self.kind == "procrustes":
            return rotate(q - eta * (t @ q - c * q))
        s = eta / 2 * (t - c * np.eye(len(t)))
        x = q - s @ q
        x = x - x @ s
        return (x + x.T) / 2

    def step(self, gradient, largest_square=None):
        """Take one step; ``largest_square`` is the group's largest mean g², for the original's first step."""
        self.t += 1
        g = np.array(gradient, dtype=np.float64).reshape(self.shape)
        if self.m is None:
            self.m = g.copy()
            power = -1 / 8 if len(self.shape) == 2 and not self.literal else -1 / 4
            square = largest_square if self.literal and largest_square is not None else np.mean(g**2)
            scale = self.start_scale or square**power
            self.q = [
                scale * (np.eye(s) if dense else np.ones(s))
                for s, dense in zip(self.shape, self.dense, strict=True)
            ]
        self.m = self.beta * self.m + (1 - self.beta) * g
        floor = 0.3 if self.literal else min(0.3, self.rate)
        eta = max(floor, self.rate / math.sqrt(1 + self.t / 10000))
        if self.t % self.balance_every == 0 and len(self.q) == 2:
            largest = [np.abs(q).max() for q in self.q]
            mean = math.sqrt(largest[0] * largest[1])
            self.q = [q * (mean / top) for q, top in zip(self.q, largest, strict=True)]
        target = g if self.whiten == "gradient" else self.m
        if self.fits(self.t) and target.any():  # do not fit to a zero matrix
            a = self.white(target)
            new = []
            for side, size in enumerate(self.shape):
                c = a.size / size
                if a.ndim == 1:
                    t = a**2
                elif self.dense[side]:
                    t = a @ a.T if side == 0 else a.T @ a
                else:
                    t = (a**2).sum(1 - side)
                new.append(self.moved(side, t, c, eta))
            self.q = new
        u = self.white(self.m)
        u = u * 1.1 / max(math.sqrt(np.mean(u**2)), 1.1)
        self.p = self.p * (1 - self.lr * self.decay)
        self.p = self.p - self.lr * u.reshape(self.p.shape) / self.divisor
