"""One step seen from inside: what it allocates, whether it is compiled, what it launches."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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


_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Observed:
    """What one step did.

    Args:
        temporary_bytes: The most that was allocated during it and not there before; None if that is not
            what a step takes.
        compiled: Whether code from torch.compile ran in it.
        launches: Kernels launched on the device; None on the CPU.
        device_ms: Milliseconds of the device's own work, copies and fills included; None on the CPU.
        products: The matrix products that it computed, with how often, if they were looked for.
    """

    temporary_bytes: int | None
    compiled: bool
    launches: int | None
    device_ms: float | None = None
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
    launches, device_ms = device_work(events) if on_cuda else (None, None)
    return Observed(
        peak(_allocations(events)) if highest is None else highest,
        any(name.startswith(_COMPILED) for name in names),
        launches,
        device_ms,
        products_in(events) if products else {},
    )


def device_work(events: Iterable[Mapping[str, Any]]) -> tuple[int, float]:
    """(kernels launched, milliseconds of kernels, copies and fills) among a profiler's trace events.

    Example:
        >>> kernel, fill = {"cat": "kernel", "dur": 1500.0}, {"cat": "gpu_memset", "dur": 500.0}
        >>> device_work([kernel, fill, {"cat": "cpu_op", "dur": 9.0}, {}])
        (1, 2.0)
    """
    work = [event for event in events if event.get("cat") in _DEVICE_WORK]
    kernels = sum(event["cat"] == "kernel" for event in work)
    return kernels, sum(float(event["dur"]) for event in work) / 1e3


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


def captured(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A function that replays the step as a CUDA graph. The step is taken once before, and not by capturing.

    Raises:
        Exception: whatever stands against it.
    """
    main = torch.cuda.current_stream(device)
    # Where a capture ends in an error, torch.cuda.graph leaves its own stream the current one.
    with torch.cuda.stream(main):
        # As torch.cuda.graph wants it: what is made or tuned at a first launch is not part of the graph.
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(main)
        with torch.cuda.stream(side), _waiting_refused():
            step()
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return graph.replay


@contextmanager
def _waiting_refused() -> Iterator[None]:
    """In it torch raises where the host would wait for the device.

    In a capture that spoils more than the graph: torch's allocator, and before 2.13 its random numbers too,
    take the capture for under way from then on, and whatever is measured next fails.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def capture(step: Callable[[], object], device: torch.device) -> str:
    """ "yes" if a CUDA graph of the step can be captured and replayed, else why not."""
    try:
        captured(step, device)()
        torch.cuda.synchronize(device)
    except Exception as error:
        return " ".join(f"no: {type(error).__name__}: {error}".split())[:160]
    return "yes"
