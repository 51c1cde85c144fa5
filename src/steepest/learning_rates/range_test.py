"""Suggest a learning rate: short trainings of copies over an exponential range of learning rates."""

from __future__ import annotations

import copy
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steepest.hyperparameters import integer, positive

__all__ = ["Suggestion", "suggest_lr"]

Batch = TypeVar("Batch")

# Neighbouring learning rates differ by half a decade.
_PER_DECADE = 2
# The range around the optimizer's own learning rate if none is given.
_DECADES = 3
# A training ends at a loss that lies so many times the first one's size above it.
_HOPELESS = 10.0


@dataclass(frozen=True)
class Suggestion:
    """The learning rate that :func:`suggest_lr` suggests, and what it rests on.

    Attributes:
        lr: the suggestion for the first param group.
        group_lrs: the suggestions for all groups, in the ratios that they had.
        lrs: the learning rates tried, rising.
        losses: the training loss that each led to; infinite if it diverged.
        initial_loss: the loss before training.
        at_edge: whether the best is the lowest or the highest tried, so that a better one may lie beyond.
    """

    lr: float
    group_lrs: tuple[float, ...]
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    initial_loss: float
    at_edge: bool

    def __str__(self) -> str:
        best = min(range(len(self.lrs)), key=lambda index: self.losses[index])
        lines = [f"learning rate {self.lr:.2g}"]
        if self.at_edge:
            side = "lowest" if best == 0 else "highest"
            lines[0] += f", the {side} tried: widen the range"
        if len(set(self.group_lrs)) > 1:
            lines[0] += f"; groups {', '.join(f'{lr:.2g}' for lr in self.group_lrs)}"
        for index, (lr, loss) in enumerate(zip(self.lrs, self.losses, strict=True)):
            shown = "diverged" if math.isinf(loss) else f"{loss:.4g}"
            lines.append(f"{lr:>9.2g}  {shown}{'  ←' if index == best else ''}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw the losses over the learning rates, with the suggestion, into a file such as ``lr.png``.

        A dotted line is the loss before training; crosses at the top are losses clearly above it.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
        axes = figure.subplots()
        best = min(self.losses)
        top = max(self.initial_loss, best) + 0.2 * abs(self.initial_loss - best)
        tried = list(zip(self.lrs, self.losses, strict=True))
        shown = [(lr, loss) for lr, loss in tried if loss <= top]
        axes.plot(*zip(*shown, strict=True), marker="o", color="#3060a0")
        for lr, loss in tried:
            if loss > top:
                axes.plot(lr, 0.96, marker="x", color="#b03030", transform=axes.get_xaxis_transform())
        axes.axhline(self.initial_loss, color="gray", linewidth=0.8, linestyle=":")
        axes.axvline(self.lr, color="#207040", linewidth=1.2)
        axes.annotate(f" {self.lr:.2g}", (self.lr, 0.9), xycoords=("data", "axes fraction"), color="#207040")
        axes.set(xscale="log", xlabel="learning rate", ylabel="training loss")
        figure.savefig(path)


def suggest_lr(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    *,
    low: float | None = None,
    high: float | None = None,
    steps: int = 60,
) -> Suggestion:
    r"""Suggest a learning rate by a range test: short trainings of copies, each at another learning rate.

    The learning rates rise exponentially, by half a decade each. A copy of model and optimizer trains
    ``steps`` steps at each of them, all from the same state and on the same batches, and the mean loss of the
    last quarter counts. The suggestion is the minimum of the parabola through the best and its neighbours.
    It is a peak for a schedule that decays. All param groups keep the ratios of their learning rates.

    Smith's range test raises the learning rate within one training. That finds where training breaks, which
    was 0.5 to 100 times the best learning rate, depending on rule and task; starting anew each time finds
    the best itself, within a factor of 3 for most (docs/learning_rates.md has the measurements, and where it
    misses: PolarGrad above all). It cannot know how long the training will be.

    The copies are deep: parameters, buffers, gradients, the optimizer and its state, and the random
    generators of torch, Python and numpy are afterwards as before, bit for bit, also after an error. A copy
    takes as much memory as model and optimizer. A test takes 13 · ``steps`` training steps by default, fewer
    where training diverges. An iterator is consumed by ``steps`` batches.

    Args:
        model: the model, in the mode in which it is to be trained.
        optimizer: any torch optimizer of its parameters, also after steps that have been taken.
        batches: an iterable; its first ``steps`` batches are used, over and over if there are fewer.
        loss: ``loss(model, batch)`` returns the scalar to minimize. It must use the model that it is given,
            which is a copy.
        low: the lowest learning rate of the first group, > 0; None is a thousandth of its present one.
        high: the highest, > ``low``; None is a thousand times the present one.
        steps: steps of every training, ≥ 1. A third of those of the training to come is what the suggestions
            were measured with; rules with small steps at first, such as PolarGrad, need as many.

    Returns:
        The :class:`Suggestion`; the optimizer keeps its learning rates.

    Raises:
        ValueError: a value out of range; no batches; a loss that is no scalar, or does not depend on the
            model that it is given; an optimizer of another model's parameters; all trainings diverged.

    Source: after Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186 (2015),
    whose test is a single ramp.

    >>> from steepest import SGD
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> optimizer = SGD(model.parameters(), lr=1e-2)
    >>> square = lambda model, batch: model(batch).square().mean()  # w², for which ½ is the best
    >>> suggestion = suggest_lr(model, optimizer, [torch.ones(1, 1)], square, low=0.05, high=5, steps=4)
    >>> suggestion.lr, model.weight.item(), optimizer.param_groups[0]["lr"]
    (0.5, 1.0, 0.01)
    >>> print(suggestion)
    learning rate 0.5
         0.05  0.5314
         0.16  0.1022
          0.5  0  ←
          1.6  diverged
            5  diverged
    """
    if not any(
        param is own for own in model.parameters() for g in optimizer.param_groups for param in g["params"]
    ):
        raise ValueError("suggest_lr(): the optimizer has none of the model's parameters")
    integer(low=1).check("suggest_lr()", "steps", steps)
    present = [float(group["lr"]) for group in optimizer.param_groups]
    if present[0] <= 0:
        raise ValueError(f"suggest_lr(): the first group's lr must be > 0, got {present[0]}")
    low = present[0] / 10**_DECADES if low is None else low
    high = present[0] * 10**_DECADES if high is None else high
    for name, value in (("low", low), ("high", high)):
        positive().check("suggest_lr()", name, value)
    if high <= low:
        raise ValueError(f"suggest_lr(): high must be above low, got {high} and {low}")
    with _restored_generators():
        some = list(itertools.islice(batches, steps))
    if not some:
        raise ValueError("suggest_lr(): there are no batches")
    count = max(1, math.ceil(round(_PER_DECADE * math.log10(high / low), 6)))
    lrs = [low * (high / low) ** (index / count) for index in range(count + 1)]
    losses, initial = [], math.nan
    for lr in lrs:
        with _restored_generators():
            seen = _train(model, optimizer, some, loss, lr / present[0], steps)
        initial = seen[0]
        last = seen[-math.ceil(steps / 4) :]
        losses.append(sum(last) / len(last) if len(seen) == steps else math.inf)
    best = min(range(len(lrs)), key=lambda index: losses[index])
    if math.isinf(losses[best]):
        raise ValueError(f"suggest_lr(): training diverged at every learning rate from {low:g} to {high:g}")
    lr = _lowest_point(lrs, losses, best)
    return Suggestion(
        lr,
        tuple(lr * each / present[0] for each in present),
        tuple(lrs),
        tuple(losses),
        initial,
        best in (0, len(lrs) - 1),
    )


def _train(
    model: nn.Module,
    optimizer: Optimizer,
    batches: list[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    factor: float,
    steps: int,
) -> list[float]:
    """Train copies with all learning rates times ``factor``; return the losses before they diverge."""
    model, optimizer = copy.deepcopy((model, optimizer))
    for group in optimizer.param_groups:
        # The others are what independent weight decay measures the learning rate by.
        for name in {"lr", "max_lr", "initial_lr", "base_lr"} & group.keys():
            group[name] = group[name] * factor
    params = [param for param in model.parameters() if param.requires_grad]
    losses: list[float] = []
    for step in range(steps):
        value = loss(model, batches[step % len(batches)])
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"suggest_lr(): loss must return a tensor of one element, got {value!r}")
        number = value.item()
        limit = losses[0] + _HOPELESS * abs(losses[0]) if losses else math.inf
        # The first loss is the same for all learning rates, and is theirs to compare with.
        if losses and not (math.isfinite(number) and number <= limit):
            break
        losses.append(number)
        optimizer.zero_grad()
        # Without `inputs`, a loss of the original model would leave gradients there.
        if value.requires_grad:
            value.backward(inputs=params)  # type: ignore[no-untyped-call]
        if all(param.grad is None for param in params):
            raise ValueError(
                "suggest_lr(): the loss does not depend on the model that loss(model, batch) is given, a copy"
            )
        optimizer.step()
    return losses


def _lowest_point(lrs: list[float], losses: list[float], best: int) -> float:
    """Return where the parabola through the best loss and its neighbours, over log(lr), is lowest."""
    around = losses[max(0, best - 1) : best + 2]
    if len(around) < 3 or not all(map(math.isfinite, around)):
        return lrs[best]
    below, lowest, above = around
    bend = below - 2 * lowest + above
    if bend <= 0:
        return lrs[best]
    return lrs[best] * math.pow(lrs[best + 1] / lrs[best], 0.5 * (below - above) / bend)


@contextmanager
def _restored_generators() -> Iterator[None]:
    """Restore the random generators of torch, Python and, if it is loaded, numpy."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    state: Any = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(state)
