"""Numbers that every framework's logger takes: learning rates, skipped steps, state bytes, flips."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from steepest.engine.update import initial_lr
from steepest.optimizer import Optimizer
from steepest.ternary.stats import FlipStats
from steepest.ternary.targets import PackedWeights

__all__ = ["group_names", "measure", "rates", "table", "unwrap"]


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
    names = [str(group.get("name", group["rule"])) for group in optimizer.param_groups]
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        seen[name] = number = seen.get(name, 0) + 1
        if number > 1:
            names[index] = f"{name} ({number})"
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
