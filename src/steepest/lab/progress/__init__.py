"""Progress display: callbacks that log lines or update a live table."""

from .callback import Callback

__all__ = ["Callback"]
