"""steepest: memory-lean, post-Adam optimizers for PyTorch."""

from steepest.optimizer import Optimizer
from steepest.options import CommonOptions
from steepest.registry import create, list_optimizers
from steepest.rules import SGD, AdamW, Lion, SGDSaI, SignGSD, Signum, Simba, SimbaLeaky

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "AdamW",
    "CommonOptions",
    "Lion",
    "Optimizer",
    "SGDSaI",
    "SignGSD",
    "Signum",
    "Simba",
    "SimbaLeaky",
    "create",
    "list_optimizers",
]
