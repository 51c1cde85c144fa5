"""The sasrec task: sequential recommendation, the problem of the Simba study."""

from .task import sasrec_task

__all__ = ["sasrec_task"]
