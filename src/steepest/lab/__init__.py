"""The lab trains and times optimizers in order to compare them.

`race` gives every optimizer the same initial weights, the same data and the same search of learning rate and
weight decay, on a built-in task or on a `Task` of your own; `sweep` searches anything. The command line runs
them as `steepest race` and `steepest sweep`. `ranking` and `write_report` read what they leave on disk.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import LabError
from .experiments.race import DEFAULT_OPTIMIZERS, race
from .experiments.sweep import Result, sweep
from .records import Experiment, Metric, Record
from .tasks.task import Task

if TYPE_CHECKING:
    from .analysis.ranking import Row
    from .report.results import ranking, write_report

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


def __getattr__(name: str) -> Any:
    # pandas and Altair take longer to import than the rest, and no worker needs them.
    if name in ("Row", "ranking", "write_report"):
        return getattr(import_module(".report.results", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
