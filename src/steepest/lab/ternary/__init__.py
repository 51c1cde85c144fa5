"""The study of ternary training: what do votes reach beside latent floats, and what does training add?"""

from .study import STUDIES, Study, run_study

__all__ = ["STUDIES", "Study", "run_study"]
