"""Profile a step: its temporary memory, kernel launches and matrix products, and whether it is compiled."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from steepest.lab.training.peak_memory import temporary_bytes

from .products import Product, count_products

MEMORY_SOURCE = {
    "cpu": "the peak of the bytes allocated and not yet freed since the start of the step, from "
    "torch.profiler's allocator events, in eager and compiled steps alike",
    "cuda": "torch.cuda.max_memory_allocated during the step minus memory_allocated before it",
}

# The profiler's names for compiled code: called through torch.compile's guards, or without them (steepest).
_COMPILED = ("Torch-Compiled Region", "## Call CompiledFxGraph")
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class StepProfile:
    """The profile of one step.

    Args:
        temporary_bytes: Peak of the memory allocated during the step; None for a graph's replay.
        compiled: Whether the step ran code from torch.compile.
        launches: Number of kernels launched on the device; None on the CPU.
        device_ms: Milliseconds of the device's work, including copies and fills; None on the CPU.
        products: The step's matrix products with their counts, if they were requested.
    """

    temporary_bytes: int | None
    compiled: bool
    launches: int | None
    device_ms: float | None = None
    products: dict[Product, int] = field(default_factory=dict)


def profile_step(step: Callable[[], object], device: torch.device, *, products: bool = False) -> StepProfile:
    """Run `step` twice, under torch.profiler; `MEMORY_SOURCE` describes how memory is measured.

    Args:
        step: The function to profile.
        device: The device that it uses.
        products: Also find matrix products; recording all shapes makes the trace large.

    Example:
        >>> def two_at_once():
        ...     a = torch.ones(1000)
        ...     b = a + 1
        ...     del a, b
        ...     return torch.ones(500).sum().item()
        >>> profiled = profile_step(two_at_once, torch.device("cpu"))
        >>> 8000 <= profiled.temporary_bytes < 9000, profiled.compiled, profiled.launches
        (True, False, None)
    """
    temporary = temporary_bytes(step, device)
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    with profile(activities=activities, record_shapes=products, acc_events=True) as recorded:
        step()
        if on_cuda:
            torch.cuda.synchronize(device)
    events = _trace(recorded)
    names = [str(event.get("name", "")) for event in events]
    launches, device_ms = device_work(events) if on_cuda else (None, None)
    return StepProfile(
        temporary,
        any(name.startswith(_COMPILED) for name in names),
        launches,
        device_ms,
        count_products(events) if products else {},
    )


def device_work(events: Iterable[Mapping[str, Any]]) -> tuple[int, float]:
    """Return (kernels launched, milliseconds of kernels, copies and fills) from a profiler's trace events.

    Example:
        >>> kernel, fill = {"cat": "kernel", "dur": 1500.0}, {"cat": "gpu_memset", "dur": 500.0}
        >>> device_work([kernel, fill, {"cat": "cpu_op", "dur": 9.0}, {}])
        (1, 2.0)
    """
    work = [event for event in events if event.get("cat") in _DEVICE_WORK]
    kernels = sum(event["cat"] == "kernel" for event in work)
    return kernels, sum(float(event["dur"]) for event in work) / 1e3


def _trace(recorded: profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8", errors="replace"))[
            "traceEvents"
        ]
    return events


def capture_graph(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Take one warm-up step, capture the step in a CUDA graph, and return a function that replays it.

    Raises:
        Exception: the step cannot be captured.
    """
    main = torch.cuda.current_stream(device)
    # If a capture fails, torch.cuda.graph leaves its own stream as the current one.
    with torch.cuda.stream(main):
        # torch.cuda.graph requires a warm-up on a side stream, for allocations and tuning at first launch.
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(main)
        with torch.cuda.stream(side), _error_on_sync():
            step()
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return graph.replay


@contextmanager
def _error_on_sync() -> Iterator[None]:
    """Make torch raise on a host sync within this context.

    A host sync during a capture breaks more than the graph: torch's allocator, and before 2.13 its random
    generator, would assume from then on that the capture is still running, and later measurements fail.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def try_capture(step: Callable[[], object], device: torch.device) -> str:
    """Return "yes" if the step can be captured in a CUDA graph and replayed, otherwise "no" and the error."""
    try:
        capture_graph(step, device)()
        torch.cuda.synchronize(device)
    except Exception as error:
        return " ".join(f"no: {type(error).__name__}: {error}".split())[:160]
    return "yes"
