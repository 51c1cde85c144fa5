"""The training problem on which optimizers are compared: model, data, loss and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor, nn

from ..records import Metric

Batch = TypeVar("Batch")
Split = Literal["validation", "test"]


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
        evaluate: `evaluate(model, split)` returns the metrics by name on the validation or the test
            data, which must not overlap. The lab calls it in evaluation mode, without gradients. The
            search sees validation data only, and the ranking shows test data only.
        metrics: The metrics that `evaluate` returns. The first is the primary one: hyper-parameters are
            chosen by it. A smooth metric (a loss) guides the search better than one that is constant
            for many steps (an accuracy).
        steps: The number of steps of a trial, unless the user asks for another.
        evaluations: Number of evaluations per trial besides the one of the untrained model.
        keep_best: Whether the weights with the best validation metric are tested, instead of the last.
        config: Everything else that must match for results to be comparable (sizes, data, a
            fingerprint), as plain JSON values. A run with another config cannot join an experiment.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 32).unsqueeze(1)
        >>> line = Task(
        ...     name="a line",
        ...     make=lambda seed: torch.nn.Linear(1, 1),
        ...     batches=lambda seed: [x[::2]],
        ...     loss=lambda model, x: (model(x) - 3 * x).square().mean(),
        ...     evaluate=lambda model, split: {"error": (model(x[1::2]) - 3 * x[1::2]).abs().mean().item()},
        ...     metrics=(Metric(name="error"),),
        ...     steps=100,
        ... )
        >>> line.loss(line.make(0), x).ndim
        0
    """

    name: str
    make: Callable[[int], nn.Module]
    batches: Callable[[int], Iterable[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[nn.Module, Split], Mapping[str, float]]
    metrics: tuple[Metric, ...]
    steps: int = 1000
    evaluations: int = 16
    keep_best: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metric(self) -> Metric:
        """The primary metric."""
        return self.metrics[0]
