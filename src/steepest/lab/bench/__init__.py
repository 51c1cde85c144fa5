"""What a step of each optimizer costs on a model; on the command line, `steepest bench`."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .costs import StepCosts, measure_costs
    from .run import bench

__all__ = ["StepCosts", "bench", "measure_costs"]

if not TYPE_CHECKING:
    # The command line's help reads the models' names without torch.
    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{'run' if name == 'bench' else 'costs'}"), name)
