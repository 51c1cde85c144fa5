"""Numbers that every framework's logger takes: learning rates, skipped steps, state bytes, flips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from steepest.engine.update import initial_lr
from steepest.group_names import another
from steepest.optimizer import Optimizer
from steepest.ternary.stats import FlipStats
from steepest.ternary.targets import PackedWeights

__all__ = ["Measures", "group_names", "measure", "rates", "table", "unwrap"]


class Measures:
    """What the callbacks for all frameworks share: they show the table once, and find the optimizer.

    Args:
        show: called on the main process, when training begins, with ``explain()``'s table at the schedule's
            initial or peak rates; None: nothing is.
    """

    def __init__(self, show: Callable[[str], Any] | None = print) -> None:
        self._show = show

    def _unwrap(self, optimizer: Any) -> Optimizer:
        return unwrap(type(self).__name__, optimizer)

    def _explain(self, optimizer: Any, is_main_process: bool) -> None:
        own = self._unwrap(optimizer)
        if self._show is not None and is_main_process:
            self._show(table(own))


def unwrap(owner: str, optimizer: Any) -> Optimizer:
    """Return the optimizer of this library that a framework has wrapped.

    Raises:
        TypeError: it is of another library; ``owner`` is named in the message.
    """
    found = optimizer
    while not isinstance(found, Optimizer):
        inner = getattr(found, "optimizer", None)
        if inner is None or inner is found:
            kind = type(found).__name__
            raise TypeError(f"{owner} measures an optimizer of steepest, but this training uses {kind}")
        found = inner
    return found


def group_names(optimizer: Optimizer) -> list[str]:
    """Return a different name for each param group: its own, or its rule's.

    >>> import torch, steepest
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> len(group_names(steepest.build(model, "muon")))
    3
    """
    names: list[str] = []
    for group in optimizer.param_groups:
        names.append(another(str(group.get("name", group["rule"])), names))
    return names


def rates(optimizer: Optimizer) -> dict[str, float]:
    """Return the learning rate of each group, as it is now.

    Schedulers move it after the step and before frameworks log: read it before the step it belongs to.
    """
    return {
        f"lr/{name}": float(group["lr"])
        for name, group in zip(group_names(optimizer), optimizer.param_groups, strict=True)
        if group["rule"] != "ternary_flip"  # flips have a threshold in place of a learning rate
    }


def measure(optimizer: Optimizer) -> dict[str, float]:
    """Return skipped steps, bytes of state, and flips of ternary weights.

    Reading them waits for the device.

    >>> import torch, steepest
    >>> lion = steepest.Lion([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
    >>> rates(lion) | measure(lion)
    {'lr/lion': 0.5, 'skipped_steps': 0.0, 'state_bytes': 0.0}
    """
    numbers = {
        "skipped_steps": float(optimizer.skipped_steps),
        "state_bytes": float(optimizer.state_bytes()),
    }
    if isinstance(optimizer.targets, PackedWeights):
        numbers |= _flips(optimizer.targets.stats())
    return numbers


def table(optimizer: Optimizer) -> str:
    """Return ``explain()``'s table with the rates that schedules start from or lead up to.

    Under warm-up the rate of the first step, often 0, says nothing about the training.
    """
    found = optimizer.explain()
    groups = [group for group in optimizer.param_groups for _ in group["params"]]
    rows = tuple(
        replace(row, lr=initial_lr(group)) if group.keys() & {"initial_lr", "max_lr"} else row
        for row, group in zip(found.rows, groups, strict=True)
    )
    return str(replace(found, rows=rows))


def _flips(stats: FlipStats) -> dict[str, float]:
    return {
        "ternary/flips": float(stats.flips),
        "ternary/total_flips": float(stats.total_flips),
        "ternary/zeros": stats.zeros,
        "ternary/threshold": stats.threshold,
    }
