"""Measure the peak memory of training 50 million weights: ternary by votes, and latent float32 by AdamW.

    python benchmarks/ternary_memory.py

Each method runs in a separate process. It reports the increase of the process's peak resident size since
before the model (``getrusage``), and the peak of torch's allocations (from its profiler). Persistent bytes
are those of the tensors that exist between steps, without gradients. "flipping" uses votes by sign with a
threshold of 2 and at most 0.1 % flips, so that the three steps flip weights. "compiled" methods compile
their flips; torch.compile's own memory does not count, because it is allocated before the model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys

import torch
from torch import Tensor, nn

import steepest
from steepest.ternary import TernaryLinear

# votes, threshold, maximum fraction of flips per step, compile
VOTES = {
    "sign": ("sign", 16, 1.0, False),
    "magnitude": ("magnitude", 16, 1.0, False),
    "flipping": ("sign", 2, 1e-3, False),
    "sign compiled": ("sign", 16, 1.0, True),
    "flipping compiled": ("sign", 2, 1e-3, True),
}
METHODS = ("float32", "latent", *VOTES)


class Latent(nn.Linear):
    """A latent float32 weight, rounded in every forward pass, with a straight-through gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        scale = self.weight.abs().mean()
        rounded = (self.weight / scale).round().clamp(-1, 1) * scale
        return nn.functional.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)


def build(method: str, width: int, depth: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build a perceptron of ``depth`` square layers and its optimizer."""
    float_layers = {"float32": nn.Linear, "latent": Latent}
    layer = float_layers.get(method, TernaryLinear)
    model = nn.Sequential(*[m for _ in range(depth) for m in (layer(width, width), nn.GELU())])
    if method in float_layers:
        return model, torch.optim.AdamW(model.parameters(), fused=True)
    votes, threshold, max_fraction, compiled = VOTES[method]
    ternary = {"votes": votes, "threshold": threshold, "max_flip_fraction": max_fraction}
    return model, steepest.build(model, "adamw", ternary=ternary, compile=compiled)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int) -> None:
    """Take some steps with an arbitrary loss."""
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def resident(method: str, width: int, depth: int, batch: int, steps: int) -> dict[str, float]:
    """Train; return the increase of the process's peak in MiB, and persistent bytes per weight."""
    # Train a small model first, so that the libraries' one-time allocations do not count.
    train(*build(method, 16, 1), torch.randn(4, 16), 2)
    x = torch.randn(batch, width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    model, optimizer = build(method, width, depth)
    train(model, optimizer, x, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {
        "persistent_bytes_per_weight": round(sum(storages.values()) / (width * width * depth), 3),
        "peak_resident_mib": round(peak - before, 1),
    }


def allocated(method: str, width: int, depth: int, batch: int, steps: int) -> dict[str, float]:
    """Train; return the peak of torch's allocations in MiB, without the profiler's own memory."""
    x = torch.randn(batch, width)
    with torch.profiler.profile(profile_memory=True) as profile:
        train(*build(method, width, depth), x, steps)
    events = profile.profiler.kineto_results.events()
    changes = (event.nbytes() for event in events if event.name() == "[memory]")
    return {"peak_torch_mib": round(max(itertools.accumulate(changes, initial=0)) / 2**20, 1)}


def main() -> None:
    """Measure every method in separate processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("width", "depth", "batch", "steps")}
    if options.only:
        method, kind = options.only
        torch.set_num_threads(1)
        print(json.dumps({"resident": resident, "allocated": allocated}[kind](method, **sizes)))
        return
    # With a fixed threshold glibc returns large freed blocks to the system instead of keeping them.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for method in METHODS:
        line: dict[str, object] = {"method": method, "weights": options.width**2 * options.depth}
        for kind in ("resident", "allocated"):
            command = [sys.executable, __file__, *(f"--{name}={size}" for name, size in sizes.items())]
            done = subprocess.run(
                [*command, "--only", method, kind],
                check=True,
                env=environment,
                capture_output=True,
                text=True,
            )
            line |= json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
