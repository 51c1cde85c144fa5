"""Count recompilations while a schedule changes every hyper-parameter that may change."""

from __future__ import annotations

import math

import torch
from torch.optim import Optimizer

from .case import LR, WEIGHT_DECAY, Case
from .compile_check import compiled_graph_count, require_compiled
from .params import SharedParams
from .shapes import tiny

STEPS = 50
_WARMUP = 10


def recompilations(case: Case, device: torch.device, steps: int = STEPS) -> int:
    """Return the graphs compiled after the first step while lr, weight decay and momentum follow a schedule.

    Raises:
        RuntimeError, RuntimeWarning: the steps were not compiled, see :func:`require_compiled`.
    """
    shared = SharedParams.create(tiny().tensors, device, torch.float32)
    optimizer = case.make(shared.params)
    after_first = 0
    with require_compiled(case):
        for number in range(steps):
            _schedule(optimizer, number, steps)
            shared.set_grads()
            optimizer.step()
            if number == 0:
                after_first = compiled_graph_count()
    return compiled_graph_count() - after_first


def _schedule(optimizer: Optimizer, number: int, steps: int) -> None:
    """Apply a linear warm-up and a cosine decay; momentum changes inversely, as in OneCycleLR."""
    warmup = min(1.0, (number + 1) / _WARMUP)
    factor = warmup * 0.5 * (1 + math.cos(math.pi * max(0, number - _WARMUP) / steps))
    for group in optimizer.param_groups:
        group["lr"] = LR * factor
        group["weight_decay"] = WEIGHT_DECAY * factor
        if group.get("momentum"):
            group["momentum"] = 0.95 - 0.1 * factor
        if "betas" in group:
            group["betas"] = (0.95 - 0.1 * factor, group["betas"][1])
