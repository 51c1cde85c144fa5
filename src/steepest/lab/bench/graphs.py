"""Was it compiled? A step whose compilation fails runs eagerly, and must not be taken for a compiled one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from torch._dynamo.utils import counters

from .entry import Entry

# How steepest says that it runs eagerly what was to be compiled.
_RUNS_EAGERLY = "steepest runs .* without compilation|compile=True"


def graphs_made() -> int:
    """How many graphs torch.compile has made in this process."""
    return int(counters["stats"]["unique_graphs"])


@contextlib.contextmanager
def really_compiled(entry: Entry) -> Iterator[None]:
    """Take an entry's steps within it, to have an error where they are not what the entry says.

    Raises:
        RuntimeWarning: steepest's own, where it goes on without compilation.
        RuntimeError: this process has made no graph at all, though the entry's steps are compiled.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", _RUNS_EAGERLY, RuntimeWarning)
        yield
    # Not whether there are new ones: an earlier section may have compiled the same step.
    if entry.how == "compiled" and graphs_made() == 0:
        raise RuntimeError(f"{entry.label} was not compiled: torch.compile made no graph")
