"""Measure the peak memory of a training step: formats of weights and state, and gradients released or not.

Each line comes from a separate process that trains a GPT for a few steps and reports two peaks:

- ``resident``: the increase of the process's resident memory since before the optimizer was constructed
  (Linux: VmHWM), which the operating system had to provide;
- ``torch``: the peak of torch's allocator during a step, including the parameters: on a CPU from the
  profiler's record of every allocation, on CUDA ``max_memory_allocated``.

``--formats`` compares float32, bfloat16 with stochastic rounding, and the least memory: bfloat16 weights with
split8 masters and one-byte averages. ``--time`` compares the times of a training step, interleaved in one
process.

    python benchmarks/training_memory.py [--device cuda] [--formats | --time]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import steepest
from steepest.lab.models.gpt import GPT, GPTConfig

RULES = ("adamw", "lion", "signgsd")
FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {"rounding": "stochastic"}),
    "least": (torch.bfloat16, {"memory": "least"}),
}
FORMATTED_RULES = ("adamw", "lion", "sgd_sai", "muon")
MODES = ("ordinary", "released", "on host", "released, on host")
WARM_UP, STEPS = 2, 3


def model_on(device: str, width: int, depth: int) -> GPT:
    """Create the model."""
    torch.manual_seed(0)
    return GPT(GPTConfig(width=width, depth=depth, heads=8, context=64)).to(device)


def train_step(model: GPT, optimizer: steepest.Optimizer, tokens: torch.Tensor) -> None:
    """Run forward, backward and step as in a training loop."""
    logits = model(tokens[:, :-1]).flatten(0, 1)
    F.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def resident(field: str) -> int:
    """Return ``VmRSS`` or ``VmHWM`` of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def peak_bytes(events: Any) -> int:
    """Return the peak of the profiler's allocations minus frees, in order of time."""
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate((change for _, change in changes), initial=0))


@contextlib.contextmanager
def record_peak(device: str, result: dict[str, int]) -> Iterator[None]:
    """Set ``result["extra"]`` to the peak of torch's memory within this context minus that before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        result["extra"] = torch.cuda.max_memory_allocated() - before
        return
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as prof:
        yield
    result["extra"] = peak_bytes(prof.profiler.kineto_results.events())


def measure(rule: str, mode: str, formats: str, device: str, width: int, depth: int) -> dict[str, float]:
    """Return both peaks for one rule, mode and formats, and the bytes of parameters and state."""
    dtype, own = FORMATS[formats]
    model = model_on(device, width, depth).to(dtype)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    tokens = torch.randint(256, (1, 65), device=device)
    model(tokens[:, :-1])  # allocates the libraries' own buffers
    before = resident("VmRSS")
    state_device = "cpu" if "on host" in mode else None
    # The peak of a compilation would hide that of the training.
    optimizer = steepest.build(model, rule, compile=False, state_device=state_device, **own)
    if "released" in mode:
        steepest.release_gradients(model, optimizer)
    for _ in range(WARM_UP):
        train_step(model, optimizer, tokens)
    after = resident("VmHWM")
    result: dict[str, int] = {}
    with record_peak(device, result):
        for _ in range(STEPS):
            train_step(model, optimizer, tokens)
    state = 0 if state_device and device != "cpu" else optimizer.state_bytes()
    return {
        "weights": weights,
        "state": state,
        "torch": weights + state + result["extra"],
        "resident": after - before,
    }


def ratios(rule: str, device: str, width: int, depth: int, rounds: int) -> tuple[float, float]:
    """Return the median seconds of an ordinary step, and the ratio with released gradients."""
    models = [model_on(device, width, depth)]
    models.append(copy.deepcopy(models[0]))
    optimizers = [steepest.create(rule, m.parameters(), compile=False) for m in models]
    steepest.release_gradients(models[1], optimizers[1])
    tokens = torch.randint(256, (1, 65), device=device)
    seconds: list[list[float]] = [[], []]
    for number in range(rounds + WARM_UP):
        for index, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            start = time.perf_counter()
            train_step(model, optimizer, tokens)
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= WARM_UP:
                seconds[index].append(time.perf_counter() - start)
    ordinary, released = map(statistics.median, seconds)
    return ordinary, released / ordinary


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--time", action="store_true", help="measure time instead of memory")
    parser.add_argument("--formats", action="store_true", help="compare formats of weights and state")
    parser.add_argument("--rounds", type=int, default=11, help="timed steps")
    parser.add_argument("--one", nargs=3, metavar=("RULE", "MODE", "FORMATS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = (options.device, options.width, options.depth)
    if options.one:
        print(json.dumps(measure(*options.one, *size)))
        return
    console = Console()
    if options.time:
        table = Table("rule", "ordinary step, ms", "released / ordinary")
        for rule in RULES:
            seconds, ratio = ratios(rule, *size, options.rounds)
            table.add_row(rule, f"{1e3 * seconds:.0f}", f"{ratio:.2f}")
        console.print(table)
        return
    columns = ("rule", "formats", "mode", "parameters", "state on device", "torch peak", "resident increase")
    table = Table(*columns, title="MB (10⁶ bytes)")
    # On a CPU the state is on the host in all modes.
    modes = MODES if options.device == "cuda" and not options.formats else MODES[:2]
    rows = itertools.product(
        FORMATTED_RULES if options.formats else RULES, FORMATS if options.formats else ["float32"], modes
    )
    for rule, formats, mode in rows:
        command = [sys.executable, __file__, "--one", rule, mode, formats, "--device", options.device]
        command += ["--width", str(options.width), "--depth", str(options.depth)]
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result = json.loads(line.splitlines()[-1])
        keys = ("weights", "state", "torch", "resident")
        table.add_row(rule, formats, mode, *(f"{result[key] / 1e6:.0f}" for key in keys))
    console.print(table)


if __name__ == "__main__":
    main()
