"""steepest: memory-lean, post-Adam optimizers for PyTorch."""

from steepest import compat, ternary, views
from steepest.autotuning import autotune, autotune_file
from steepest.explain import Explanation
from steepest.hyperparameters import CommonOptions
from steepest.learning_rates import from_adamw, shadow, suggest_lr
from steepest.master_weights import master_state_dict
from steepest.optimizer import Optimizer
from steepest.optimizer_in_backward import ReleasedGradients, release_gradients
from steepest.planning import Plan, compare_plans, plan
from steepest.registry import create, list_optimizers
from steepest.routing import Auto, Recipe, build, param_groups
from steepest.rule import Rule
from steepest.rules import (
    QUAD,
    SGD,
    SOAP,
    AdamMini,
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
from steepest.trust import (
    Certificate,
    DictCallback,
    Measurements,
    Telemetry,
    TensorBoardCallback,
    Verification,
    VerificationError,
    certify,
    flatten_state_dict,
    load_checkpoint,
    save_checkpoint,
    telemetry,
    unflatten_state_dict,
    verify,
)

__version__ = "0.1.0"

__all__ = [
    "QUAD",
    "SGD",
    "SOAP",
    "AdEMAMix",
    "AdamMini",
    "AdamW",
    "Auto",
    "Certificate",
    "CommonOptions",
    "DictCallback",
    "Explanation",
    "Hyperball",
    "Lion",
    "Measurements",
    "Muon",
    "MuonOptions",
    "NorMuon",
    "Optimizer",
    "OrthogonalizedOptimizer",
    "Plan",
    "PolarGrad",
    "Procrustes",
    "Recipe",
    "ReleasedGradients",
    "Rule",
    "SGDSaI",
    "Scion",
    "SignGSD",
    "Signum",
    "Simba",
    "SimbaLeaky",
    "Telemetry",
    "TensorBoardCallback",
    "Verification",
    "VerificationError",
    "autotune",
    "autotune_file",
    "build",
    "certify",
    "compare_plans",
    "compat",
    "create",
    "flatten_state_dict",
    "from_adamw",
    "list_optimizers",
    "load_checkpoint",
    "master_state_dict",
    "param_groups",
    "plan",
    "release_gradients",
    "save_checkpoint",
    "shadow",
    "suggest_lr",
    "telemetry",
    "ternary",
    "unflatten_state_dict",
    "verify",
    "views",
]
