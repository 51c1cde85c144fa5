"""The benchmark of optimizer steps and their hardware limits. On the command line, `steepest bench`.

`bench` measures step times, memory and first-step latencies on the parameter shapes of real models,
interleaved with the machine's limits and with other packages' optimizers.
"""

from .results import Column, Record, Result
from .runner import bench, report
from .section import BenchConfig, Section

__all__ = ["BenchConfig", "Column", "Record", "Result", "Section", "bench", "report"]
