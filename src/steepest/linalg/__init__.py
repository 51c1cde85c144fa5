"""Batched matrix functions [..., m, n], usable alone: what the matrix rules are made of."""

from steepest.linalg.newton_schulz import COEFFICIENTS, CoefficientSet, newton_schulz
from steepest.linalg.procrustes import procrustes_rotation
from steepest.linalg.spectral_norm import spectral_norm_bound
from steepest.linalg.symmetric import gram, preferred_symmetric_kernel, symmetric_product

__all__ = [
    "COEFFICIENTS",
    "CoefficientSet",
    "gram",
    "newton_schulz",
    "preferred_symmetric_kernel",
    "procrustes_rotation",
    "spectral_norm_bound",
    "symmetric_product",
]
