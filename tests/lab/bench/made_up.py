"""Contestants that do what a test needs, and a setting of toy size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from steepest.lab.bench.entry import Entry
from steepest.lab.bench.families import Family
from steepest.lab.bench.section import Setting
from steepest.lab.bench.shapes import tiny


class Stepping(torch.optim.SGD):
    """SGD, after which `then` is called with its parameters."""

    def __init__(self, params: Any, then: Callable[[list[torch.Tensor]], object]) -> None:
        super().__init__(params, lr=1e-3)
        self.then = then

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        super().step()
        self.then(self.param_groups[0]["params"])


def peer(
    label: str,
    then: Callable[[list[torch.Tensor]], object] = lambda params: None,
    *,
    rule: str = "sgd",
    copies: float = 0.0,
) -> Entry:
    def make(params: Any) -> torch.optim.Optimizer:
        return Stepping([param for _, param in params], then)

    return Entry(rule, label, "a peer", "default", make, copies)


def failing(label: str, error: Exception) -> Entry:
    def make(params: Any) -> torch.optim.Optimizer:
        raise error

    return Entry("sgd", label, "a peer", "default", make)


def setting(*families: Family, memory: int = 1 << 30, rounds: int = 2, device: str = "cpu") -> Setting:
    return Setting([tiny()], families, torch.device(device), torch.float32, rounds, 1, memory)
