"""One step seen from inside: what it allocates, whether it is compiled, what it launches."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .products import Product, products_in

MEMORY_IS_KNOWN_BY = {
    "cpu": "torch.profiler's allocator events: the largest sum of what was allocated and not yet freed since "
    "the step began, in eager and compiled steps alike",
    "cuda": "torch.cuda.max_memory_allocated during the step, less memory_allocated before it",
}

# What the profiler calls code of torch.compile: that of peers behind its guards, ours without.
_COMPILED = ("Torch-Compiled Region", "## Call CompiledFxGraph")


@dataclass(frozen=True)
class Observed:
    """What one step did.

    Args:
        temporary_bytes: The most that was allocated during it and not there before.
        compiled: Whether code from torch.compile ran in it.
        launches: Kernels launched on the device; None on the CPU.
        products: The matrix products that it computed, with how often, if they were looked for.
    """

    temporary_bytes: int
    compiled: bool
    launches: int | None
    products: dict[Product, int] = field(default_factory=dict)


def observe(act: Callable[[], object], device: torch.device, *, products: bool = False) -> Observed:
    """Run `act` once, slowly, and see what it does; `MEMORY_IS_KNOWN_BY` says how.

    Args:
        act: What to look into.
        device: Where it works.
        products: Look for matrix products too: shapes of all operations make a long trace.

    Example:
        >>> def two_at_once():
        ...     a = torch.ones(1000)
        ...     b = a + 1
        ...     del a, b
        ...     return torch.ones(500).sum().item()
        >>> seen = observe(two_at_once, torch.device("cpu"))
        >>> 8000 <= seen.temporary_bytes < 9000, seen.compiled, seen.launches
        (True, False, None)
    """
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    before = _cuda_memory(device) if on_cuda else 0
    # The profiler announces itself on standard error unless it is told not to.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(
        activities=activities, profile_memory=True, record_shapes=products, acc_events=True
    ) as recorded:
        act()
        if on_cuda:
            torch.cuda.synchronize(device)
    highest = torch.cuda.max_memory_allocated(device) - before if on_cuda else None
    events = _trace(recorded)
    names = [str(event.get("name", "")) for event in events]
    return Observed(
        peak(_allocations(events)) if highest is None else highest,
        any(name.startswith(_COMPILED) for name in names),
        sum(event.get("cat") == "kernel" for event in events) if on_cuda else None,
        products_in(events) if products else {},
    )


def _cuda_memory(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _trace(recorded: profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8", errors="replace"))[
            "traceEvents"
        ]
    return events


def _allocations(events: Sequence[dict[str, Any]]) -> list[int]:
    memory = [event for event in events if event.get("name") == "[memory]"]
    # Sorting is stable: events of one instant keep the order in which they were recorded.
    memory.sort(key=lambda event: float(event["ts"]))
    return [int(event["args"]["Bytes"]) for event in memory]


def peak(changes: Iterable[int]) -> int:
    """The largest sum of a beginning of the sequence; 0 if none is positive.

    Example:
        >>> peak([4, 8, -4, 2, -10])
        12
    """
    highest = total = 0
    for change in changes:
        total += change
        highest = max(highest, total)
    return highest


def capture(step: Callable[[], object], device: torch.device) -> str:
    """ "yes" if a CUDA graph of the step can be captured and replayed, else why not."""
    try:
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        torch.cuda.synchronize(device)
    except Exception as error:
        return " ".join(f"no: {type(error).__name__}: {error}".split())[:160]
    return "yes"
