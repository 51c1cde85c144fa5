"""The options of a TernaryFlip: plain data, except for a schedule given as a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from steepest.hyperparameters import (
    Hyperparameter,
    choice,
    fraction,
    integer,
    near_miss,
    optional,
    plain,
    positive,
)
from steepest.ternary.schedule import annealed

__all__ = ["OPTIONS", "Schedule", "checked", "threshold_at"]

# "constant", "annealed", or τ as a function of the steps taken.
Schedule: TypeAlias = str | Callable[[int], float]

OPTIONS: dict[str, Hyperparameter] = {
    "threshold": positive(),
    "votes": choice("sign", "magnitude"),
    "accumulator": choice(torch.int8, torch.int16),
    "schedule": choice("constant", "annealed", "custom"),
    "total_steps": optional(integer(low=1)),
    "power": positive(),
    "outward": choice("cancel", "drop"),
    "zero_pull": fraction(closed=True),
    "max_flip_fraction": fraction(closed=True),
    "nonfinite": choice("ignore", "skip", "raise"),
    "compile": choice(None, True, False),
    "seed": integer(low=0, high=2**64 - 1),
}

_DEFAULTS: dict[str, Any] = {
    "threshold": 24.0,
    "votes": "sign",
    "accumulator": torch.int8,
    "schedule": "constant",
    "total_steps": None,
    "power": 1.0,
    "outward": "cancel",
    "zero_pull": 0.0,
    "max_flip_fraction": 1.0,
    "nonfinite": "ignore",
    "compile": None,
    "seed": 0,
}


def checked(owner: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the defaults and check the options.

    Raises:
        TypeError: an unknown name.
        ValueError: a value out of range, or two that exclude each other.
    """
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"{owner} has no option {name!r}{near_miss(name, OPTIONS)}")
    full = {name: plain(value) for name, value in {**_DEFAULTS, **options}.items()}
    for name, hyper in OPTIONS.items():
        hyper.check(owner, name, full[name])
    if full["schedule"] == "annealed" and full["total_steps"] is None:
        raise ValueError(
            f"{owner}: schedule='annealed' needs total_steps, the number of steps of the training"
        )
    limit = torch.iinfo(full["accumulator"]).max
    if full["threshold"] > limit:
        more = "; accumulator=torch.int16 holds 32767" if limit == 127 else ""
        raise ValueError(
            f"{owner}: threshold {full['threshold']:g} is never reached: {full['accumulator']} saturates at "
            f"{limit}{more}"
        )
    return full


def threshold_at(options: Mapping[str, Any], custom: Callable[[int], float] | None, step: int) -> float:
    """Return τ after ``step`` steps.

    Raises:
        ValueError: the schedule given as a function returned no number above 0.
    """
    if options["schedule"] == "custom":
        assert custom is not None
        value = float(custom(step))
        if math.isnan(value) or value <= 0:
            raise ValueError(f"the schedule's threshold at step {step} must be above 0, got {value!r}")
        return value
    if options["schedule"] == "annealed":
        return annealed(options["threshold"], step, options["total_steps"], options["power"])
    return float(options["threshold"])
