"""Race optimizers on a model of your own.

Run `python examples/race_your_model.py [DIRECTORY]`; it takes about 15 seconds and writes
DIRECTORY/report.html (default: runs/spirals).
"""

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steepest.lab import Metric, Result, Task, race, ranking, write_report

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


def evaluate(model: nn.Module, split: str) -> dict[str, float]:
    """The metrics, on points that training never sees; the search sees those for validation only."""
    return {"loss": loss(model, spirals(1024, seed={"validation": 2, "test": 3}[split])).item()}


SPIRALS = Task(
    name="two spirals",
    # The race seeds torch's generators before this call, so the function can ignore the seed.
    make=lambda seed: nn.Sequential(
        nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
    ),
    batches=batches,
    loss=loss,
    evaluate=evaluate,
    # The search chooses by the first metric. A smooth one (a loss) works better than one that is constant for
    # many steps (an accuracy).
    metrics=(Metric(name="loss", unit="nats"),),
)


def main(directory: str = "runs/spirals") -> Result:
    # The model is tiny: more threads would only wait for each other.
    torch.set_num_threads(1)
    # Names of steepest's optimizers; anybody's as "torch.optim:Adam", or with a label as ("label", factory).
    # So few steps and trials only show how it works: leave out `steps` and `trials` for an answer.
    optimizers = ["adamw", "lion", "torch.optim:Adam"]
    result = race(SPIRALS, optimizers, trials=4, seeds=3, steps=100, out=directory)
    for row in ranking(directory):
        best = ", ".join(f"{name} {value:.2g}" for name, value in row.best.items())
        print(f"{row.optimizer}: test loss {row.test.mean:.3f} ± {row.test.std:.3f} with {best}; ", end="")
        print(f"{row.state_bytes:.1f} bytes of state per parameter{', a tie' if row.tie else ''}")
    print(f"report: {write_report(directory)}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
