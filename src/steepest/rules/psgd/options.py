"""The ranges of the hyperparameters that QUAD and Procrustes share."""

from __future__ import annotations

from typing import Any

import torch

from steepest.hyperparameters import (
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

__all__ = ["PSGD_HYPER"]


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


# What products, norms and traces are there for on every device.
_ALGEBRA = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

PSGD_HYPER: dict[str, Hyperparameter] = {
    "lr": learning_rate(),
    "lr_style": choice("adam", None),
    "momentum": fraction(),
    "weight_decay": at_least(0),
    "max_size_dense": Hyperparameter(_is_size, "a number ≥ 0, infinity included"),
    "max_skew_dense": Hyperparameter(_is_size, "a number ≥ 0, infinity included", traced=True),
    "preconditioner_lr": positive(),
    "preconditioner_init_scale": optional(positive()),
    "noise_scale": at_least(0),
    "dtype": Hyperparameter(
        lambda value: value is None or value in _ALGEBRA,
        f"None, {', '.join(map(str, _ALGEBRA[:-1]))} or {_ALGEBRA[-1]}",
    ),
    "preconditioner_min_lr": positive(),
    "whiten": choice("momentum", "gradient"),
    "update_probability": rate(),
    "update_flat_steps": integer(low=0),
    "update_decay_steps": integer(low=0),
    "norm": choice("bound", "exact"),
    "literal": flag(),
}
