"""Benchmark cases: an optimizer and how it is executed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

import steepest

Params = list[tuple[str, nn.Parameter]]
Scope = Literal["element", "matrix"]

OURS = "steepest"
GRAPH = "graph"
"""The `how` of a case that is captured in a CUDA graph and replayed."""

How = Literal["eager", "compiled", "graph"]

# Large enough that a step visibly changes the parameters, small enough for fifty steps to be harmless.
LR = 1e-3
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Case:
    """An optimizer that is constructed from a list of named parameters and measured.

    Args:
        rule: steepest's rule that this is, or that it is compared with because its equation is the same.
        label: Name in the tables.
        source: Package.
        how: "eager", "compiled", "graph", or a peer's own execution mode ("fused", "foreach", "default").
        make: Constructs the optimizer. It may raise anything; the table then shows the error.
        state_copies: Approximate size of a peer's state in multiples of the parameters, to plan memory.
    """

    rule: str
    label: str
    source: str
    how: str
    make: Callable[[Params], Optimizer]
    state_copies: float = 0.0

    @property
    def ours(self) -> bool:
        """Whether the optimizer is one of steepest's."""
        return self.source == OURS

    @property
    def key(self) -> str:
        """A string that is unique within a group."""
        return f"{self.source}:{self.label}:{self.how}"


def ours(rule: str, how: How, label: str | None = None, **hyper: Any) -> Case:
    """Create a case for one of steepest's optimizers; a graph is captured from the compiled step."""

    def make(params: Params) -> Optimizer:
        options = {"lr": LR, "weight_decay": WEIGHT_DECAY, **hyper}
        device = params[0][1].device
        # On the meta device there are no steps, and a tensor lr has no value.
        if how == GRAPH and device.type != "meta":
            options |= {"capturable": True, "lr": torch.tensor(LR, device=device)}
        return steepest.create(rule, params, compile=how != "eager", **options)

    return Case(rule, label or rule, OURS, how, make)


@contextmanager
def failing_if_eager() -> Iterator[None]:
    """Make the warning with which steepest falls back to eager steps an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "steepest runs .* without compilation|compile=True", RuntimeWarning)
        yield
