"""The training problem on which optimizers are compared: model, data, loss and metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Task(Generic[Batch]):
    """A complete training problem: everything needed to train a model and evaluate it.

    The callables receive the trial's seed. Before each call the lab seeds torch's global generators
    with it, and afterwards restores them, so a `make` that only builds a module is reproducible.

    Args:
        name: The task's name in the report.
        make: `make(seed)` returns a freshly initialized model on its training device.
        batches: `batches(seed)` returns an iterable of batches in an order given by the seed. It may
            be infinite; when it ends, the lab calls `batches` again with another seed (next epoch).
        loss: `loss(model, batch)` returns the scalar tensor to minimize.
        evaluate: `evaluate(model)` returns the metric on held-out data. The lab calls it in
            evaluation mode, without gradients, and chooses learning rates by it: a smooth metric (a
            loss) guides the search better than one that is constant for many steps (an accuracy).
        metric: The metric's name.
        unit: The metric's unit, which may be empty.
        lower_is_better: Whether a smaller metric is better.
        config: Everything else that must match for results to be comparable (sizes, data, a
            fingerprint), as plain JSON values. The plan stores it, and a run with another config
            cannot resume in the same directory.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 32).unsqueeze(1)
        >>> line = Task(
        ...     name="a line",
        ...     make=lambda seed: torch.nn.Linear(1, 1),
        ...     batches=lambda seed: [x],
        ...     loss=lambda model, x: (model(x) - 3 * x).square().mean(),
        ...     evaluate=lambda model: (model(x) - 3 * x).square().mean().item(),
        ...     metric="squared error",
        ... )
        >>> line.loss(line.make(0), x).ndim
        0
    """

    name: str
    make: Callable[[int], nn.Module]
    batches: Callable[[int], Iterable[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[nn.Module], float]
    metric: str = "validation loss"
    unit: str = ""
    lower_is_better: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)

    def score(self, metric: float) -> float:
        """Return the metric with its sign chosen so that lower is always better."""
        return metric if self.lower_is_better else -metric
