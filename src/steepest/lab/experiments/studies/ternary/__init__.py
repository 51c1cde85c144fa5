"""Ternary training: votes, latent floats, Bop, and frozen random ternary weights compared."""

from .study import METHODS, TASKS, run

__all__ = ["METHODS", "TASKS", "run"]
