"""Check that a step was compiled, because it falls back to eager execution if compilation fails."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from torch._dynamo.utils import counters

from .case import Case

# The warnings with which steepest falls back to eager execution.
_RUNS_EAGERLY = "steepest runs .* without compilation|compile=True"


def compiled_graph_count() -> int:
    """Return the number of graphs that torch.compile has compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


@contextlib.contextmanager
def require_compiled(case: Case) -> Iterator[None]:
    """Raise an error if steps taken in this context should be compiled but are not.

    Raises:
        RuntimeWarning: steepest falls back to eager execution.
        RuntimeError: the case is compiled, but this process has compiled no graph at all.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", _RUNS_EAGERLY, RuntimeWarning)
        yield
    # New graphs are not required, because an earlier section may have compiled the same step.
    if case.how == "compiled" and compiled_graph_count() == 0:
        raise RuntimeError(f"{case.label} was not compiled: torch.compile made no graph")
