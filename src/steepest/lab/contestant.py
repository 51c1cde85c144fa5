"""Who races: an optimizer under a label, with the learning rate its author would start from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .errors import LabError

Factory = Callable[..., Optimizer]
"""Called as `factory(params)` for the defaults and as `factory(params, lr=...)` for a trial."""

Maker = Callable[[nn.Module, float | None], Optimizer]
"""Makes an optimizer for a model; without an lr, the one its author would start from."""


@dataclass(frozen=True)
class Contestant:
    """An optimizer that can be built again for every trial."""

    label: str
    make: Maker
    default_lr: float
    hyper: Mapping[str, Any]
    """All hyper-parameters but lr, as plain JSON values."""
    own_model: bool = False
    """Whether `make` changes the model, so that it cannot be shared with others."""

    def build(self, model: nn.Module, lr: float) -> Optimizer:
        """A fresh optimizer of the model's trainable parameters."""
        return self.make(model, lr)


Entry = str | Factory | tuple[str, Factory] | Contestant
"""A name `steepest.build` knows, an optimizer class, a label with a factory, or a contestant ready made."""


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters an optimizer is given."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def enlist(entries: Entry | Iterable[Entry], model: nn.Module) -> list[Contestant]:
    """Look every entry up and try it on the model, before any time is spent on training.

    Args:
        entries: Names, optimizer classes or (label, factory) pairs; a single name or class is one entry.
        model: The model to be trained. Optimizers are built on it, none takes a step.

    Raises:
        LabError: no entries, two under one label, an unknown name, no default lr, an optimizer that
            refuses the model or an lr, or one that needs a closure.
    """
    listed = [_labelled(entry) for entry in _listed(entries)]
    if not listed:
        raise LabError("no optimizers to race: name at least one, such as 'adamw'; " + _known())
    labels = [entry.label if isinstance(entry, Contestant) else entry[0] for entry in listed]
    for label in labels:
        if labels.count(label) > 1:
            raise LabError(f"optimizer {label!r} is entered twice")
    return [entry if isinstance(entry, Contestant) else _enlist(*entry, model) for entry in listed]


def _listed(entries: Entry | Iterable[Entry]) -> list[Entry]:
    if isinstance(entries, (str, Contestant)) or (callable(entries) and not isinstance(entries, Iterable)):
        return [entries]
    if isinstance(entries, tuple) and len(entries) == 2 and isinstance(entries[0], str):
        label, factory = entries
        if callable(factory):
            # One labelled entry, or a name and a class? Either reading would surprise someone.
            raise LabError(f"write [({label!r}, …)] for one labelled entry, or [{label!r}, …] for two")
    if not isinstance(entries, Iterable):
        raise LabError(f"optimizers must be a list of names or (label, factory) pairs, got {_said(entries)}")
    return list(entries)


def _labelled(entry: Entry) -> tuple[str, Factory | None] | Contestant:
    """The entry's label, and its factory unless it is one of steepest's names; a contestant as it is."""
    if isinstance(entry, Contestant):
        return entry
    if isinstance(entry, str):
        return entry, None
    if isinstance(entry, tuple):
        if len(entry) == 2 and isinstance(entry[0], str) and callable(entry[1]):
            return entry
    elif callable(entry):
        name = getattr(entry, "__name__", "<partial>")
        if name.startswith("<"):
            raise LabError(f"an optimizer without a name: enter it as ('label', {_said(entry)})")
        return name, entry
    raise LabError(
        f"an optimizer is a name, a torch optimizer class or a (label, factory) pair, not {_said(entry)}"
    )


def _enlist(label: str, factory: Factory | None, model: nn.Module) -> Contestant:
    make = _routed(label) if factory is None else _made_by(factory)
    try:
        optimizer = make(model, None)
        defaults = optimizer.defaults
        needs_closure = _required(optimizer.step)
    except (AttributeError, TypeError, ValueError) as error:
        raise LabError(str(error) if factory is None else f"{label}: {error}") from error
    if not isinstance(optimizer, Optimizer):
        raise LabError(f"{label}: its factory returned {_said(optimizer)}, not a torch.optim.Optimizer")
    if needs_closure:
        raise LabError(
            f"{label} cannot race: its step() needs {needs_closure!r}, and the race calls step() without"
        )
    lr = defaults.get("lr")
    if not isinstance(lr, int | float | torch.Tensor) or not float(lr) > 0:
        raise LabError(f"{label} has no positive default lr to start the search from")
    try:
        make(model, float(lr))
    except (TypeError, ValueError) as error:
        raise LabError(f"{label}: it must take lr= for the search: {error}") from error
    hyper = {name: plain(value) for name, value in defaults.items() if name != "lr"}
    return Contestant(label, make, float(lr), hyper)


def _required(call: Callable[..., Any]) -> str | None:
    """The first argument that has no default."""
    for parameter in inspect.signature(call).parameters.values():
        if parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            return parameter.name
    return None


def _routed(name: str) -> Maker:
    """By name, each tensor with the rule that is right for it: matrix rules do not take all."""
    import steepest

    return lambda model, lr: steepest.build(model, name, lr=lr)


def _made_by(factory: Factory) -> Maker:
    return lambda model, lr: factory(trainable(model), **({} if lr is None else {"lr": lr}))


def _known() -> str:
    import steepest

    return f"steepest has {', '.join(steepest.list_optimizers())}"


def _said(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"a {type(value).__name__}"


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
