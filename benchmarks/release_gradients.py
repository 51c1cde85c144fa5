"""Peak memory of a training step, ordinary and with gradients released.

Each line is a process of its own, which trains a GPT for a few steps and reports two peaks:

- ``resident``: how far the process's resident memory rose above what it was before the optimizer was
  made (Linux: VmHWM), what the operating system had to find;
- ``torch``: the most bytes that torch's allocator had out during a step, with the parameters: on a CPU
  from the profiler's record of every allocation, on CUDA ``max_memory_allocated``.

``--time`` measures instead how long a whole step takes, alternately in one process, as a ratio.

    python benchmarks/release_gradients.py [--device cuda] [--time]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
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
WAYS = ("ordinary", "released", "on host", "released, on host")
WARM_UP, STEPS = 2, 3


def model_on(device: str, width: int, depth: int) -> GPT:
    """The model that is trained."""
    torch.manual_seed(0)
    return GPT(GPTConfig(width=width, depth=depth, heads=8, context=64)).to(device)


def train_step(model: GPT, optimizer: steepest.Optimizer, tokens: torch.Tensor) -> None:
    """Forward, backward, step, as a training loop has them."""
    logits = model(tokens[:, :-1]).flatten(0, 1)
    F.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def highest(events: Any) -> int:
    """The highest sum of the profiler's allocations and frees, in the order of time."""
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total = peak = 0
    for _, change in changes:
        total += change
        peak = max(peak, total)
    return peak


@contextlib.contextmanager
def counted(device: str, found: dict[str, int]) -> Iterator[None]:
    """Put into ``found`` how many bytes beyond those that were there torch had out at most."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        found["extra"] = torch.cuda.max_memory_allocated() - before
        return
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as prof:
        yield
    found["extra"] = highest(prof.profiler.kineto_results.events())


def measure(rule: str, way: str, device: str, width: int, depth: int) -> dict[str, float]:
    """Both peaks of one rule run one way, in bytes, with the parameters' and the state's."""
    model = model_on(device, width, depth)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    tokens = torch.randint(256, (1, 65), device=device)
    model(tokens[:, :-1])  # the libraries' own buffers
    before = resident("VmRSS")
    place = "cpu" if "on host" in way else None
    # Compiling has a peak of its own, once, which is not the training's.
    optimizer = steepest.create(rule, model.parameters(), compile=False, state_device=place)
    if "released" in way:
        steepest.release_gradients(model, optimizer)
    for _ in range(WARM_UP):
        train_step(model, optimizer, tokens)
    after = resident("VmHWM")
    found: dict[str, int] = {}
    with counted(device, found):
        for _ in range(STEPS):
            train_step(model, optimizer, tokens)
    state = 0 if place and device != "cpu" else optimizer.state_bytes()
    return {
        "weights": weights,
        "state": state,
        "torch": weights + state + found["extra"],
        "resident": after - before,
    }


def ratios(rule: str, device: str, width: int, depth: int, rounds: int) -> tuple[float, float]:
    """Median seconds of an ordinary step, and how many times that a released one takes."""
    models = [model_on(device, width, depth)]
    models.append(copy.deepcopy(models[0]))
    optimizers = [steepest.create(rule, m.parameters(), compile=False) for m in models]
    steepest.release_gradients(models[1], optimizers[1])
    tokens = torch.randint(256, (1, 65), device=device)
    seconds: list[list[float]] = [[], []]
    for turn in range(rounds + WARM_UP):
        for index, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            start = time.perf_counter()
            train_step(model, optimizer, tokens)
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= WARM_UP:
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
    parser.add_argument("--rounds", type=int, default=11, help="steps that are timed")
    parser.add_argument("--one", nargs=2, metavar=("RULE", "WAY"), help=argparse.SUPPRESS)
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
    columns = ("rule", "way", "parameters", "state there", "torch peak", "resident rise")
    table = Table(*columns, title="MB (10⁶ bytes)")
    # On a CPU there is nowhere else to keep state.
    for rule in RULES:
        for way in WAYS if options.device == "cuda" else WAYS[:2]:
            command = [sys.executable, __file__, "--one", rule, way, "--device", options.device]
            command += ["--width", str(options.width), "--depth", str(options.depth)]
            line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(line.splitlines()[-1])
            keys = ("weights", "state", "torch", "resident")
            table.add_row(rule, way, *(f"{found[key] / 1e6:.0f}" for key in keys))
    console.print(table)


if __name__ == "__main__":
    main()
