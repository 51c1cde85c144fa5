"""Does a schedule recompile? Graphs are counted while everything that may change does."""

from __future__ import annotations

import math

import torch
from torch.optim import Optimizer

from .entry import LR, WEIGHT_DECAY, Entry
from .graphs import graphs_made, really_compiled
from .material import Material
from .shapes import tiny

STEPS = 50
_WARMUP = 10


def recompilations(entry: Entry, device: torch.device, steps: int = STEPS) -> int:
    """Graphs made after the first of `steps` steps of a schedule of lr, weight decay and momentum.

    Raises:
        RuntimeError, RuntimeWarning: the steps were not compiled, see :func:`really_compiled`.
    """
    material = Material.of(tiny().tensors, device, torch.float32)
    optimizer = entry.make(material.params)
    after_first = 0
    with really_compiled(entry):
        for number in range(steps):
            _schedule(optimizer, number, steps)
            material.lend_gradients()
            optimizer.step()
            if number == 0:
                after_first = graphs_made()
    return graphs_made() - after_first


def _schedule(optimizer: Optimizer, number: int, steps: int) -> None:
    """Linear warm-up, then half a cosine; momentum moves the other way, as in OneCycleLR."""
    up = min(1.0, (number + 1) / _WARMUP)
    share = up * 0.5 * (1 + math.cos(math.pi * max(0, number - _WARMUP) / steps))
    for group in optimizer.param_groups:
        group["lr"] = LR * share
        group["weight_decay"] = WEIGHT_DECAY * share
        if group.get("momentum"):
            group["momentum"] = 0.95 - 0.1 * share
        if "betas" in group:
            group["betas"] = (0.95 - 0.1 * share, group["betas"][1])
