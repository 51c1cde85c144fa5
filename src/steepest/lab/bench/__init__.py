"""What a step of each optimizer costs on a model; on the command line, `steepest bench`."""

from .costs import StepCosts, measure_costs
from .run import bench

__all__ = ["StepCosts", "bench", "measure_costs"]
