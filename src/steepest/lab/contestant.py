"""Who races: an optimizer under a label, with the learning rate its author would start from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from .errors import LabError

Factory = Callable[..., Optimizer]
"""Called as `factory(params)` for the defaults and as `factory(params, lr=...)` for a trial."""

Entry = str | tuple[str, Factory]
"""A name `steepest.create` knows, or a label and a factory of one's own."""


@dataclass(frozen=True)
class Contestant:
    """An optimizer that can be built again for every trial."""

    label: str
    factory: Factory
    default_lr: float
    hyper: Mapping[str, Any]
    """All hyper-parameters but lr, as plain JSON values."""

    def build(self, model: nn.Module, lr: float) -> Optimizer:
        """A fresh optimizer of the model's trainable parameters."""
        return self.factory(trainable(model), lr=lr)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters an optimizer is given."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def enlist(entries: Iterable[Entry], model: nn.Module) -> list[Contestant]:
    """Look every entry up and try it on the model, before any time is spent on training.

    Args:
        entries: Names or (label, factory) pairs.
        model: The model to be trained. Optimizers are built on it, none takes a step.

    Raises:
        LabError: no entries, two under one label, an unknown name, no default lr, or an optimizer
            that refuses the model.
    """
    listed = list(entries)
    if not listed:
        raise LabError("no optimizers to race")
    labels = [entry if isinstance(entry, str) else entry[0] for entry in listed]
    for label in labels:
        if labels.count(label) > 1:
            raise LabError(f"optimizer {label!r} is entered twice")
    return [_enlist(entry, model) for entry in listed]


def _enlist(entry: Entry, model: nn.Module) -> Contestant:
    if isinstance(entry, str):
        import steepest

        label, factory = entry, cast(Factory, partial(steepest.create, entry))
    else:
        label, factory = entry
    try:
        defaults = factory(trainable(model)).defaults
    except (TypeError, ValueError) as error:
        raise LabError(str(error) if isinstance(entry, str) else f"{label}: {error}") from error
    lr = defaults.get("lr")
    if not isinstance(lr, int | float | torch.Tensor) or not float(lr) > 0:
        raise LabError(f"{label} has no positive default lr to start the search from")
    hyper = {name: plain(value) for name, value in defaults.items() if name != "lr"}
    return Contestant(label, factory, float(lr), hyper)


def plain(value: Any) -> Any:
    """The value as JSON would give it back; what JSON does not know becomes its text.

    Example:
        >>> plain({"betas": (0.9, 0.99), "dtype": torch.float32})
        {'betas': [0.9, 0.99], 'dtype': 'torch.float32'}
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    return str(value)
