"""The hyper-parameters that QUAD and Procrustes share, with their ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from steepest.hyperparameters import (
    CommonOptions,
    Hyperparameter,
    at_least,
    choice,
    flag,
    fraction,
    integer,
    learning_rate,
    optional,
    positive,
    rate,
)
from steepest.views import View, fused_parameters

__all__ = ["PSGD_HYPER", "PSGDOptions"]


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


# What products, norms and traces are there for on every device.
_ALGEBRA = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

PSGD_HYPER: dict[str, Hyperparameter] = {
    "lr": learning_rate(1e-3),
    "lr_style": choice("adam", "adam", None),
    "momentum": fraction(0.95),
    "weight_decay": at_least(0, 0.1),
    "max_size_dense": Hyperparameter(16384, _is_size, "a number ≥ 0, infinity included"),
    "max_skew_dense": Hyperparameter(1.0, _is_size, "a number ≥ 0, infinity included"),
    "preconditioner_lr": positive(0.7),
    "preconditioner_init_scale": optional(positive(1.0)),
    "noise_scale": at_least(0, 1e-9),
    "dtype": Hyperparameter(
        None,
        lambda value: value is None or value in _ALGEBRA,
        f"None, {', '.join(map(str, _ALGEBRA[:-1]))} or {_ALGEBRA[-1]}",
    ),
    "preconditioner_min_lr": positive(0.3),
    "whiten": choice("momentum", "momentum", "gradient"),
    "update_probability": rate(1.0),
    "update_flat_steps": integer(1000, low=0),
    "update_decay_steps": integer(1000, low=0),
    "norm": choice("bound", "bound", "exact"),
    "literal": flag(False),
    "views": fused_parameters(),
    "bucket_bytes": integer(1 << 28, low=1),
}


class PSGDOptions(CommonOptions, total=False):
    """Keyword-only options of QUAD and Procrustes; their docstrings say what they mean."""

    preconditioner_min_lr: float
    whiten: Literal["momentum", "gradient"]
    update_probability: float
    update_flat_steps: int
    update_decay_steps: int
    norm: Literal["bound", "exact"]
    literal: bool
    views: Mapping[str, View] | None
    bucket_bytes: int
