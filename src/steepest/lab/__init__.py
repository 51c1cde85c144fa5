"""The lab trains and times optimizers in order to compare them.

`race` gives every optimizer the same initial weights, the same data and the same number of trials, on a
built-in task or on a `Task` of your own. The command line runs it as `steepest race`.
"""

from .errors import LabError
from .racing import DEFAULT_OPTIMIZERS, RaceResult, race
from .ranking import Row
from .task import Task

__all__ = ["DEFAULT_OPTIMIZERS", "LabError", "RaceResult", "Row", "Task", "race"]
