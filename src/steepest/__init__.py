"""steepest: memory-lean, post-Adam optimizers for PyTorch."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    from steepest.routing import Auto, Recipe, param_groups
    from steepest.routing.build import build  # a module of that name hides the function from mypy
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
        flatten_state_dict,
        load_checkpoint,
        save_checkpoint,
        unflatten_state_dict,
    )
    from steepest.trust.certify import certify
    from steepest.trust.telemetry import telemetry
    from steepest.trust.verify import verify

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

# The modules in whose `__all__` a public name is looked for, in this order. `steepest --help` needs none of
# them, and so waits for neither them nor torch.
_HOMES = (
    "autotuning",
    "hyperparameters",
    "rule",
    "explain",
    "master_weights",
    "rules",  # before Optimizer, so that a subclass whose rule takes the name of one of ours raises at once
    "optimizer",
    "registry",
    "optimizer_in_backward",
    "routing",
    "planning",
    "trust",
    "learning_rates",
)
# They need more than torch: `import steepest.lab` asks for it.
_NOT_ATTRIBUTES = ("integrations", "lab")


def _find(name: str) -> object:
    is_module = name.isidentifier() and not name.startswith("_") and name not in _NOT_ATTRIBUTES
    if is_module and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    for home in _HOMES if name in __all__ else ():
        module = import_module(f"{__name__}.{home}")
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:
    # A checker that saw this would let every misspelt name pass.
    def __getattr__(name: str) -> object:
        value = _find(name)
        globals()[name] = value
        return value
