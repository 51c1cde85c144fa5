"""A study of ternary training: votes, latent floats, Bop, and frozen random ternary weights compared."""

from .study import STUDIES, Study, run_study

__all__ = ["STUDIES", "Study", "run_study"]
