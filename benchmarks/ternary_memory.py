"""Peak memory of training 50 million weights: ternary by votes, and latent float32 by AdamW.

    python benchmarks/ternary_memory.py

Each way runs in a process of its own: the process's largest resident size over what it had before the
model (``getrusage``), and the largest sum of torch's own allocations (its profiler). Persistent bytes are
those of the tensors that exist between steps, without gradients. "flipping" is votes by sign with a threshold
of 2 and at most 0.1 % flips, so that the three steps flip weights. "compiled" ways compile their flips; what
torch.compile itself takes is not counted, since it is there before the model.
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

# votes, τ, at most this part flips in a step, compile
VOTES = {
    "sign": ("sign", 16, 1.0, False),
    "magnitude": ("magnitude", 16, 1.0, False),
    "flipping": ("sign", 2, 1e-3, False),
    "sign compiled": ("sign", 16, 1.0, True),
    "flipping compiled": ("sign", 2, 1e-3, True),
}
WAYS = ("float32", "latent", *VOTES)


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
    votes, threshold, most, compiled = VOTES[way]
    how = {"votes": votes, "threshold": threshold, "max_flip_fraction": most}
    return model, steepest.build(model, "adamw", ternary=how, compile=compiled)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int) -> None:
    """Some steps toward nothing in particular."""
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def resident(way: str, width: int, depth: int, batch: int, steps: int) -> dict[str, float]:
    """Train; the growth of the process in MiB, and persistent bytes a weight."""
    # What libraries allocate once is no part of the model: a small one goes first.
    train(*made(way, 16, 1), torch.randn(4, 16), 2)
    x = torch.randn(batch, width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    model, optimizer = made(way, width, depth)
    train(model, optimizer, x, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {
        "persistent_bytes_per_weight": round(sum(storages.values()) / (width * width * depth), 3),
        "peak_resident_mib": round(peak - before, 1),
    }


def allocated(way: str, width: int, depth: int, batch: int, steps: int) -> dict[str, float]:
    """Train; the largest sum of torch's allocations in MiB (not the profiler's records)."""
    x = torch.randn(batch, width)
    with torch.profiler.profile(profile_memory=True) as profile:
        train(*made(way, width, depth), x, steps)
    held = largest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            largest = max(largest, held)
    return {"peak_torch_mib": round(largest / 2**20, 1)}


def main() -> None:
    """Measure every way, each in processes of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = {name: getattr(given, name) for name in ("width", "depth", "batch", "steps")}
    if given.only:
        way, kind = given.only
        torch.set_num_threads(1)
        print(json.dumps({"resident": resident, "allocated": allocated}[kind](way, **sizes)))
        return
    # glibc keeps large blocks that were freed unless it is told a fixed size from which to return them.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for way in WAYS:
        line: dict[str, object] = {"way": way, "weights": given.width**2 * given.depth}
        for kind in ("resident", "allocated"):
            command = [sys.executable, __file__, *(f"--{name}={size}" for name, size in sizes.items())]
            done = subprocess.run(
                [*command, "--only", way, kind], check=True, env=environment, capture_output=True, text=True
            )
            line |= json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
