"""What a step of each optimizer costs on a model: `steepest bench`."""

from .costs import StepCosts, measure_costs
from .run import bench

__all__ = ["StepCosts", "bench", "measure_costs"]
