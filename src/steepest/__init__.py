"""steepest: memory-lean, post-Adam optimizers for PyTorch."""

from steepest import compat, ternary, views
from steepest.autotuning import autotune, autotune_file
from steepest.explain import Explanation
from steepest.hyperparameters import CommonOptions
from steepest.learning_rates import from_adamw, shadow, suggest_lr
from steepest.master_weights import master_state_dict
from steepest.optimizer import Optimizer
from steepest.optimizer_in_backward import ReleasedGradients, release_gradients
from steepest.registry import create, list_optimizers
from steepest.routing import build
from steepest.rule import Rule
from steepest.rules import (
    QUAD,
    SGD,
    SOAP,
    AdamW,
    AdEMAMix,
    Hyperball,
    Lion,
    Muon,
    MuonOptions,
    NorMuon,
    OrthogonalizedOptimizer,
    PolarGrad,
    Procrustes,
    Scion,
    SGDSaI,
    SignGSD,
    Signum,
    Simba,
    SimbaLeaky,
)

__version__ = "0.1.0"

__all__ = [
    "QUAD",
    "SGD",
    "SOAP",
    "AdEMAMix",
    "AdamW",
    "CommonOptions",
    "Explanation",
    "Hyperball",
    "Lion",
    "Muon",
    "MuonOptions",
    "NorMuon",
    "Optimizer",
    "OrthogonalizedOptimizer",
    "PolarGrad",
    "Procrustes",
    "ReleasedGradients",
    "Rule",
    "SGDSaI",
    "Scion",
    "SignGSD",
    "Signum",
    "Simba",
    "SimbaLeaky",
    "autotune",
    "autotune_file",
    "build",
    "compat",
    "create",
    "from_adamw",
    "list_optimizers",
    "master_state_dict",
    "release_gradients",
    "shadow",
    "suggest_lr",
    "ternary",
    "views",
]
