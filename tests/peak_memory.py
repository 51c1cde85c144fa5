"""Measure peak memory with torch's profiler."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import profile

__all__ = ["highest"]


def highest(act: Callable[[], object]) -> int:
    """Return the largest number of bytes that ``act`` holds allocated while it runs."""
    with profile(profile_memory=True) as seen:
        act()
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
