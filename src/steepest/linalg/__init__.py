"""Provide the batched matrix functions [..., m, n] that the matrix rules use; each also works alone."""

from steepest.linalg.coefficients import COEFFICIENTS, CoefficientSet
from steepest.linalg.newton_schulz import newton_schulz
from steepest.linalg.normalization import Normalization
from steepest.linalg.precision import MatmulPrecision, float32_matmul_precision
from steepest.linalg.procrustes import procrustes_rotation
from steepest.linalg.spectral_norm import spectral_norm_bound
from steepest.linalg.symmetric import gram, preferred_symmetric_kernel, symmetric_product

__all__ = [
    "COEFFICIENTS",
    "CoefficientSet",
    "MatmulPrecision",
    "Normalization",
    "float32_matmul_precision",
    "gram",
    "newton_schulz",
    "preferred_symmetric_kernel",
    "procrustes_rotation",
    "spectral_norm_bound",
    "symmetric_product",
]
