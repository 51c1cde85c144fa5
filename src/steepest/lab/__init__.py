"""The lab trains and times optimizers in order to compare them.

`race` gives every optimizer the same initial weights, the same data and the same search of learning rate and
weight decay, on a built-in task or on a `Task` of your own; `sweep` searches anything. The command line runs
them as `steepest race` and `steepest sweep`. `ranking` and `write_report` read what they leave on disk.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .defaults import RACE_OPTIMIZERS as DEFAULT_OPTIMIZERS
from .errors import LabError

if TYPE_CHECKING:
    from .analysis.ranking import Row
    from .experiments.race import race
    from .experiments.sweep import Result, sweep
    from .records import Experiment, Metric, Record
    from .report import ranking, write_report
    from .tasks.task import Task

__all__ = [
    "DEFAULT_OPTIMIZERS",
    "Experiment",
    "LabError",
    "Metric",
    "Record",
    "Result",
    "Row",
    "Task",
    "race",
    "ranking",
    "sweep",
    "write_report",
]

# Training needs neither pandas nor Altair, and the command line's help not even torch.
_HOMES = {
    "analysis.ranking": ("Row",),
    "experiments.race": ("race",),
    "experiments.sweep": ("Result", "sweep"),
    "records": ("Experiment", "Metric", "Record"),
    "report": ("ranking", "write_report"),
    "tasks.task": ("Task",),
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:
    # A checker that saw this would let every misspelt name pass.
    def __getattr__(name: str) -> object:
        for home, names in _HOMES.items():
            if name in names:
                return getattr(import_module(f"{__name__}.{home}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
