"""Watching a race: silently, in plain lines, or live on a terminal."""

from .watcher import Silent, Watcher

__all__ = ["Silent", "Watcher"]
