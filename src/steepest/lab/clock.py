"""Time, read when the device has finished what it was given."""

from __future__ import annotations

import time

import torch
from torch import nn


def now(device: torch.device) -> float:
    """Seconds on a monotonic clock, after all work queued on `device` is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives; the CPU if it has none."""
    for parameter in model.parameters():
        return parameter.device
    return torch.device("cpu")


def span(seconds: float) -> str:
    """A length of time as a person would write it.

    Example:
        >>> span(42.4), span(65), span(3725)
        ('42 s', '1 min 05 s', '1 h 02 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
