"""What QUAD and Procrustes share: everything but how Q moves and what P is made of it."""

from steepest.rules.psgd.optimizer import PSGD
from steepest.rules.psgd.options import PSGD_HYPER
from steepest.rules.psgd.rule import PSGDRule
from steepest.rules.psgd.schedule import fits_in
from steepest.rules.psgd.shapes import sides_of

__all__ = ["PSGD", "PSGD_HYPER", "PSGDRule", "fits_in", "sides_of"]
