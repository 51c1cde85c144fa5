"""The lab: which optimizer should I use? Everything that trains in order to compare.

`race` gives every optimizer the same weights, the same data and the same number of trials, on a task
of the lab's own or on a `Task` of yours. On the command line it is `steepest race`.
"""

from .errors import LabError
from .racing import DEFAULT_OPTIMIZERS, RaceResult, race
from .standings import Row
from .task import Task

__all__ = ["DEFAULT_OPTIMIZERS", "LabError", "RaceResult", "Row", "Task", "race"]
