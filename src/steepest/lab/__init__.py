"""The lab trains and times optimizers in order to compare them.

`race` gives every optimizer the same initial weights, the same data and the same search of learning rate and
weight decay, on a built-in task or on a `Task` of your own; `sweep` searches anything. The command line runs
them as `steepest race` and `steepest sweep`. `ranking` and `write_report` read what they leave on disk.
"""

from .analysis.ranking import Row
from .errors import LabError
from .experiments.race import DEFAULT_OPTIMIZERS, race
from .experiments.sweep import Result, sweep
from .records import Experiment, Metric, Record
from .report.results import ranking, write_report
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
