"""Peak memory of training 50 million weights: ternary by votes, and latent float32 by AdamW.

    python benchmarks/ternary_memory.py

Each way runs in a process of its own: the process's largest resident size over what it had before the
model (``getrusage``), and the largest sum of torch's own allocations (its profiler). Persistent bytes are
those of the tensors that exist between steps, without gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys

import torch
from torch import Tensor, nn

import steepest
from steepest.ternary import TernaryLinear

WAYS = ("float32", "latent", "sign", "magnitude")
_MIB = 2**20


class Latent(nn.Linear):
    """A latent float32 weight, rounded in every forward pass, with a straight-through gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., in] to [..., out]."""
        scale = self.weight.abs().mean()
        rounded = (self.weight / scale).round().clamp(-1, 1) * scale
        return nn.functional.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)


def made(way: str, width: int, depth: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A perceptron of ``depth`` square layers, and its optimizer."""
    kinds = {"float32": nn.Linear, "latent": Latent}
    kind = kinds.get(way, TernaryLinear)
    model = nn.Sequential(*[m for _ in range(depth) for m in (kind(width, width), nn.GELU())])
    if way in kinds:
        return model, torch.optim.AdamW(model.parameters(), fused=True)
    return model, steepest.build(model, "adamw", ternary={"votes": way, "threshold": 16})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int) -> None:
    """Some steps toward nothing in particular."""
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def run(way: str, width: int, depth: int, batch: int, steps: int) -> dict[str, float | str]:
    """Train; MiB at the peak and between steps."""
    torch.set_num_threads(1)
    # What libraries allocate once is no part of the model: a small one goes first.
    train(*made(way, 16, 1), torch.randn(4, 16), 2)
    x = torch.randn(batch, width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        model, optimizer = made(way, width, depth)
        train(model, optimizer, x, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    held = largest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()
            largest = max(largest, held)
    weights = width * width * depth
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {
        "way": way,
        "weights": weights,
        "persistent_bytes_per_weight": round(sum(storages.values()) / weights, 3),
        "peak_resident_mib": round(peak - before, 1),
        "peak_torch_mib": round(largest / _MIB, 1),
    }


def main() -> None:
    """Measure every way, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--way", choices=WAYS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(run(given.way, given.width, given.depth, given.batch, given.steps)))
        return
    sizes = [f"--{name}={getattr(given, name)}" for name in ("width", "depth", "batch", "steps")]
    for way in WAYS:
        # glibc keeps large blocks that were freed unless it is told a fixed size from which to return them.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        subprocess.run([sys.executable, __file__, f"--way={way}", *sizes], check=True, env=environment)


if __name__ == "__main__":
    main()
