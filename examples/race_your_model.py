"""Race optimizers on a model of your own.

Run `python examples/race_your_model.py [DIRECTORY]`; it takes a few seconds and writes
DIRECTORY/report.html (default: runs/spirals).
"""

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steepest.lab import RaceResult, Task, race

Batch = tuple[Tensor, Tensor]


def spirals(points: int, seed: int) -> Batch:
    """Two interleaved spirals: points of shape (points, 2) and their labels, 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (points,), generator=generator)
    radius = torch.rand(points, generator=generator).sqrt()
    angle = 4 * radius + torch.pi * labels
    position = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1)
    return position + 0.02 * torch.randn(points, 2, generator=generator), labels


def batches(seed: int) -> Iterator[Batch]:
    """One epoch of training points in an order given by the seed. The race calls this for every epoch."""
    positions, labels = spirals(1024, seed=1)
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(seed))
    for indices in order.split(64):
        yield positions[indices], labels[indices]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    positions, labels = batch
    return F.cross_entropy(model(positions), labels)


def held_out_loss(model: nn.Module) -> float:
    return loss(model, spirals(1024, seed=2)).item()


SPIRALS = Task(
    name="two spirals",
    # The race seeds torch's generators before this call, so the function can ignore the seed.
    make=lambda seed: nn.Sequential(
        nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
    ),
    batches=batches,
    loss=loss,
    # The search chooses learning rates by this metric. A smooth one (a loss) works better than one that is
    # constant for many steps (an accuracy).
    evaluate=held_out_loss,
    metric="held-out loss",
    unit="nats",
)


def main(directory: str = "runs/spirals") -> RaceResult:
    # Pass names of steepest's optimizers, and (label, class) pairs for others.
    result = race(
        SPIRALS,
        ["lion", "signum", ("torch Adam", torch.optim.Adam)],
        trials=4,
        seeds=3,
        steps=150,
        out=directory,
    )
    for row in result.rows:
        print(
            f"{row.optimizer:>10}: {row.metric:.3f} ± {row.std:.3f} at lr {row.lr:g}, "
            f"{row.state_bytes_per_parameter:.1f} state bytes per parameter"
        )
    print(f"report: {result.report}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
