"""The command line of the lab."""

from .app import run

__all__ = ["run"]
