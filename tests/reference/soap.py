"""SOAP in float64 numpy, from Algorithm 3 of arXiv 2409.11321 and the paper's implementation notes."""

from __future__ import annotations

import numpy as np


def eigenbasis(moment):
    """Eigenvectors, the largest eigenvalue's first."""
    return np.linalg.eigh(moment)[1][:, ::-1]


def power_step(moment, basis):
    """One power iteration and QR, and the order in which the columns were taken: by estimated eigenvalue."""
    order = np.argsort(-np.diag(basis.T @ moment @ basis), kind="stable")
    return np.linalg.qr(moment @ basis[:, order])[0], order


class SOAP:
    """One matrix [m, n], or a vector, stepped by ``step(g)``; the first call only makes the bases."""

    def __init__(
        self,
        start,
        *,
        lr,
        betas=(0.95, 0.95),
        shampoo_beta=None,
        eps=1e-8,
        weight_decay=1e-2,
        precondition_frequency=10,
        max_precond_dim=10000,
    ):
        self.p = np.array(start, dtype=float)
        self.lr, self.eps, self.weight_decay, self.every = lr, eps, weight_decay, precondition_frequency
        self.beta1, self.beta2 = betas
        self.beta = self.beta2 if shampoo_beta is None else shampoo_beta
        self.m, self.v = np.zeros_like(self.p), np.zeros_like(self.p)
        rotated = [self.p.ndim == 2 and size <= max_precond_dim for size in self.p.shape]
        self.moments = [
            np.zeros((s, s)) if yes else None for s, yes in zip(self.p.shape, rotated, strict=True)
        ]
        self.bases = [np.eye(s) for s in self.p.shape]
        self.t = -1

    def turn(self, x, back=False):
        if self.p.ndim < 2:
            return x
        left, right = (q.T for q in self.bases) if back else self.bases
        return left.T @ x @ right

    def step(self, g):
        self.t += 1
        self.p = self.p - self.lr * self.weight_decay * self.p
        if self.t > 0:
            self.m = self.beta1 * self.m + (1 - self.beta1) * g
            self.v = self.beta2 * self.v + (1 - self.beta2) * self.turn(g) ** 2
            first = self.turn(self.m) / (1 - self.beta1**self.t)
            second = np.sqrt(self.v / (1 - self.beta2**self.t)) + self.eps
            self.p = self.p - self.lr * self.turn(first / second, back=True)
        for side, moment in enumerate(self.moments):
            if moment is None:
                continue
            square = g @ g.T if side == 0 else g.T @ g
            self.moments[side] = moment = self.beta * moment + (1 - self.beta) * square
            if self.t == 0:
                self.bases[side] = eigenbasis(moment)
            elif self.t % self.every == 0:
                self.bases[side], order = power_step(moment, self.bases[side])
                self.v = np.take(self.v, order, axis=side)
