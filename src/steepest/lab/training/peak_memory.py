"""The peak of the memory that a step allocates, and the memory that is free."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def temporary_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the peak of the bytes that a step allocates and has not yet freed; runs the step once.

    On CUDA this is `torch.cuda.max_memory_allocated` minus what was allocated before; elsewhere it comes
    from torch.profiler's allocator events, in eager and compiled steps alike.

    Example:
        >>> def step():
        ...     a = torch.ones(1000)
        ...     b = a + 1
        ...     del a, b
        ...     return torch.ones(500).sum()
        >>> 8000 <= temporary_bytes(step, torch.device("cpu")) < 9000
        True
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # By default the profiler writes log lines to standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        step()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    # The sort is stable, so simultaneous events keep the order of recording.
    changes = sorted(
        (each for each in events if each.get("name") == "[memory]"), key=lambda each: float(each["ts"])
    )
    return max(accumulate((int(each["args"]["Bytes"]) for each in changes), initial=0))


def available_bytes(device: torch.device) -> int:
    """Return the free memory of a device; 4 GiB if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="utf-8").splitlines() if meminfo.exists() else []
    found = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return next(found, 4 << 30)
