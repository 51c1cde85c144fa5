"""Fake cases whose steps do what a test needs, and a configuration of toy size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from steepest.lab.bench.case import Case
from steepest.lab.bench.groups import Group
from steepest.lab.bench.section import BenchConfig
from steepest.lab.bench.shapes import tiny


class SGDWithCallback(torch.optim.SGD):
    """SGD that calls `callback` with its parameters after each step."""

    def __init__(self, params: Any, callback: Callable[[list[torch.Tensor]], object]) -> None:
        super().__init__(params, lr=1e-3)
        self.callback = callback

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        super().step()
        self.callback(self.param_groups[0]["params"])


def peer(
    label: str,
    callback: Callable[[list[torch.Tensor]], object] = lambda params: None,
    *,
    rule: str = "sgd",
    state_copies: float = 0.0,
) -> Case:
    def make(params: Any) -> torch.optim.Optimizer:
        return SGDWithCallback([param for _, param in params], callback)

    return Case(rule, label, "a peer", "default", make, state_copies)


def failing(label: str, error: Exception) -> Case:
    def make(params: Any) -> torch.optim.Optimizer:
        raise error

    return Case("sgd", label, "a peer", "default", make)


def config(*groups: Group, memory: int = 1 << 30, rounds: int = 2, device: str = "cpu") -> BenchConfig:
    return BenchConfig([tiny()], groups, torch.device(device), torch.float32, rounds, 1, memory)
