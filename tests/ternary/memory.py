"""How much memory something takes, as torch's profiler sees it."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import profile

__all__ = ["highest"]


def highest(act: Callable[[], object]) -> int:
    """The most bytes that are allocated while it runs and were not there before."""
    with profile(profile_memory=True) as seen:
        act()
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
