"""Timestamps that wait for the device, and formatted durations."""

from __future__ import annotations

import time

import torch
from torch import nn


def now(device: torch.device) -> float:
    """Synchronize with `device`, then read a monotonic clock in seconds."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter; the CPU if the model has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def format_duration(seconds: float) -> str:
    """Format a duration for people.

    Example:
        >>> format_duration(42.4), format_duration(65), format_duration(3725)
        ('42 s', '1 min 05 s', '1 h 02 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
