"""What QUAD and Procrustes share: everything but how Q moves and what P is made of it."""

from steepest.rules.psgd.factors import sides_of
from steepest.rules.psgd.rule import PSGD, PSGDRule, fits_in

__all__ = ["PSGD", "PSGDRule", "fits_in", "sides_of"]
