"""Who is measured: an optimizer, how it is run, and what its step cannot do without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

Params = list[tuple[str, nn.Parameter]]
Scope = Literal["element", "matrix"]

OURS = "steepest"
GRAPH = "graph"
"""How an entry is run that is captured in a CUDA graph and replayed."""

How = Literal["eager", "compiled", "graph"]

# Enough to see that a step moves something, little enough that fifty of them do no harm.
LR = 1e-3
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Entry:
    """An optimizer that can be made of a list of named parameters.

    Args:
        rule: Ours that it is, or is compared with: both must move the same bytes at least.
        label: What the table calls it.
        source: The package that it is from.
        how: "eager", "compiled", "graph", or the peer's own way ("fused", "foreach", "default").
        make: Makes it. May raise anything: a peer's failure is a row of the table.
        copies: A peer's state in copies of the parameters, about, to plan its memory by.
    """

    rule: str
    label: str
    source: str
    how: str
    make: Callable[[Params], Optimizer]
    copies: float = 0.0

    @property
    def ours(self) -> bool:
        """Whether it is one of steepest's."""
        return self.source == OURS

    @property
    def key(self) -> str:
        """What tells it from all others of a family."""
        return f"{self.source}:{self.label}:{self.how}"


def ours(rule: str, how: How, label: str | None = None, **hyper: Any) -> Entry:
    """One of steepest's, by name, told to compile or not to; compiled too where it is to be captured."""
    import steepest

    def make(params: Params) -> Optimizer:
        options = {"lr": LR, "weight_decay": WEIGHT_DECAY, **hyper}
        device = params[0][1].device
        # On the meta device nothing is stepped, and a learning rate has no value.
        if how == GRAPH and device.type != "meta":
            options |= {"capturable": True, "lr": torch.tensor(LR, device=device)}
        return steepest.create(rule, params, compile=how != "eager", **options)

    return Entry(rule, label or rule, OURS, how, make)
