"""The races that come with the lab, one a file."""

from .digits import digits_task
from .text import text_task

__all__ = ["digits_task", "text_task"]
