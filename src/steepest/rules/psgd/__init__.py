"""PSGD, the base of QUAD and Procrustes: everything but the fit of Q and the formula of P."""

from steepest.rules.psgd.factors import sides_of
from steepest.rules.psgd.rule import PSGD, PSGDRule, fits_in

__all__ = ["PSGD", "PSGDRule", "fits_in", "sides_of"]
