"""The lab's built-in tasks, one per file."""

from .digits import digits_task
from .text import text_task

__all__ = ["digits_task", "text_task"]
