"""What an optimizer is raced on: a model, its data, its loss and the figure that decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Task(Generic[Batch]):
    """A training problem, complete: whoever holds a `Task` can train and judge an optimizer on it.

    The callables take the seed of the trial. They are called with torch's global generators seeded
    by it and put back afterwards, so a `make` that only constructs a module is reproducible as it is.

    Args:
        name: What the report calls the task.
        make: `make(seed)` returns the model with fresh weights, on the device it is to train on.
        batches: `batches(seed)` returns an iterable of batches in the seed's order. It may be
            endless; one that ends is asked for again, with another seed, for the next pass.
        loss: `loss(model, batch)` returns the scalar tensor to minimize.
        evaluate: `evaluate(model)` returns the figure of merit on held-out data. It is called in
            evaluation mode, without gradients. Learning rates are chosen by it, so a smooth figure (a
            loss) makes a better search than one that stands still for long (an accuracy).
        metric: The name of that figure.
        unit: Its unit, which may be empty.
        lower_is_better: Whether a smaller figure wins.
        config: What else makes a result comparable with another (sizes, data, a fingerprint): plain
            JSON values, written into the plan. A folder begun under another config is refused.

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
        """The metric turned so that lower is better, whichever way the task counts."""
        return metric if self.lower_is_better else -metric
