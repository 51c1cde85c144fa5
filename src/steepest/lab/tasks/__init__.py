"""The lab's built-in tasks, one per file, and tasks of your own."""

from .digits import digits_task
from .images import images_task
from .load import load_task
from .task import Task
from .text import text_task

__all__ = ["Task", "digits_task", "images_task", "load_task", "text_task"]
