"""The benchmark: what an optimizer's step costs, and what limits it. On the command line, `steepest bench`.

`bench` takes step times, memory and first-step latencies on the shapes of real models, interleaved with
the machine's own limits and with other packages' optimizers.
"""

from .results import Column, Record, Result
from .running import bench, report
from .section import Section, Setting

__all__ = ["Column", "Record", "Result", "Section", "Setting", "bench", "report"]
