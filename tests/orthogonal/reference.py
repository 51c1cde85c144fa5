"""Reference steps of the orthogonalized family in float64, one matrix at a time, from the papers."""

from __future__ import annotations

import math

import numpy as np


def polar(u: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(u, full_matrices=False)
    return left @ right


def averaged(m: np.ndarray, g: np.ndarray, beta: float, nesterov: bool) -> tuple[np.ndarray, np.ndarray]:
    m = m + (1 - beta) * (g - m)
    return m, (g + beta * (m - g) if nesterov else m)


SCALES = {
    "original": lambda out, inn: max(1.0, out / inn) ** 0.5,
    "match_rms_adamw": lambda out, inn: 0.2 * max(out, inn) ** 0.5,
    "spectral": lambda out, inn: max(out, inn) ** 0.5,
    "unit_rms_norm": lambda out, inn: (out / inn) ** 0.5,
    "none": lambda out, inn: 1.0,
}


def muon(p, gradients, *, lr, beta=0.95, decay=0.0, nesterov=True, scale="match_rms_adamw", extra=1.0):
    m = np.zeros_like(p)
    for g in gradients:
        m, u = averaged(m, g, beta, nesterov)
        p = p * (1 - lr * decay) - lr * extra * SCALES[scale](*p.shape) * polar(u)
    return p


def normuon(p, gradients, *, lr, beta=0.95, beta2=0.95, eps=1e-8, scale="match_rms_adamw"):
    m, v = np.zeros_like(p), np.zeros((p.shape[0], 1))
    for g in gradients:
        m, u = averaged(m, g, beta, True)
        o = SCALES[scale](*p.shape) * polar(u)
        v = beta2 * v + (1 - beta2) * np.mean(o**2, axis=1, keepdims=True)
        even = o / (np.sqrt(v) + eps)
        p = p - lr * even * np.linalg.norm(o) / np.linalg.norm(even)
    return p


def polargrad(p, gradients, *, lr, beta=0.95):
    m = np.zeros_like(p)
    for g in gradients:
        m, u = averaged(m, g, beta, True)
        nuclear = np.linalg.svd(u, compute_uv=False).sum()
        p = p - lr * nuclear * polar(u)
    return p


def scion(p, gradients, *, lr, beta=0.9, radius=50.0):
    m = np.zeros_like(p)
    for g in gradients:
        m = beta * m + (1 - beta) * g
        p = (1 - lr) * p - lr * radius * math.sqrt(p.shape[0] / p.shape[1]) * polar(m)
    return p


def hyperball(p, gradients, *, lr, beta=0.95, radius=None):
    radius = np.linalg.norm(p) if radius is None else radius
    m = np.zeros_like(p)
    for g in gradients:
        m, u = averaged(m, g, beta, True)
        o = polar(u)
        p = p - lr * radius * o / np.linalg.norm(o)
        p = radius * p / np.linalg.norm(p)
    return p
