"""The sasrec task: sequential recommendation, the problem of the Simba study."""

from .interactions import Interactions, read_interactions
from .metrics import baselines
from .model import SASRec, SASRecConfig
from .synthetic import Synthetic, SyntheticConfig, generate
from .task import next_item_task, reversal_task, sasrec_task

__all__ = [
    "Interactions",
    "SASRec",
    "SASRecConfig",
    "Synthetic",
    "SyntheticConfig",
    "baselines",
    "generate",
    "next_item_task",
    "read_interactions",
    "reversal_task",
    "sasrec_task",
]
