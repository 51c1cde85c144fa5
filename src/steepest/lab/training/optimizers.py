"""The optimizers of a race: a label, a factory, and the default learning rate."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import steepest

from .errors import LabError

Factory = Callable[..., Optimizer]
"""Called as `factory(params)` for the defaults and as `factory(params, lr=...)` for a trial."""

Builder = Callable[[nn.Module, float | None], Optimizer]
"""Builds an optimizer for a model; if lr is None, with the optimizer's default."""


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer that is built anew for every trial."""

    label: str
    builder: Builder
    default_lr: float
    hyper: Mapping[str, Any]
    """All hyper-parameters but lr, as plain JSON values."""
    changes_model: bool = False
    """Whether `builder` modifies the model, so that other optimizers cannot share it."""

    def build(self, model: nn.Module, lr: float) -> Optimizer:
        """Build a fresh optimizer for the model's trainable parameters."""
        return self.builder(model, lr)


OptimizerLike = str | Factory | tuple[str, Factory] | OptimizerSpec
"""A name that `steepest.build` knows, an optimizer class, a (label, factory) pair, or an `OptimizerSpec`."""


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def resolve_optimizers(
    entries: OptimizerLike | Iterable[OptimizerLike], model: nn.Module
) -> list[OptimizerSpec]:
    """Build every optimizer once, so that a bad entry fails before any time is spent on training.

    Args:
        entries: Names, optimizer classes or (label, factory) pairs; a single name or class is one entry.
        model: The model to be trained. The optimizers are built for it, but take no step.

    Raises:
        LabError: no entries, a duplicate label, an unknown name, no default lr, an optimizer that
            rejects the model or an lr, or one that needs a closure.
    """
    labelled = [_with_label(entry) for entry in _as_list(entries)]
    if not labelled:
        raise LabError("no optimizers to race: name at least one, such as 'adamw'; " + _known_names())
    labels = [entry.label if isinstance(entry, OptimizerSpec) else entry[0] for entry in labelled]
    for label in labels:
        if labels.count(label) > 1:
            raise LabError(f"optimizer {label!r} is listed twice")
    return [entry if isinstance(entry, OptimizerSpec) else _resolve(*entry, model) for entry in labelled]


def _as_list(entries: OptimizerLike | Iterable[OptimizerLike]) -> list[OptimizerLike]:
    if isinstance(entries, (str, OptimizerSpec)) or (callable(entries) and not isinstance(entries, Iterable)):
        return [entries]
    if isinstance(entries, tuple) and len(entries) == 2 and isinstance(entries[0], str):
        label, factory = entries
        if callable(factory):
            # Ambiguous: this may be one labelled factory, or a name and a class.
            raise LabError(f"write [({label!r}, …)] for one labelled optimizer, or [{label!r}, …] for two")
    if not isinstance(entries, Iterable):
        raise LabError(
            f"optimizers must be a list of names or (label, factory) pairs, got {_short_repr(entries)}"
        )
    return list(entries)


def _with_label(entry: OptimizerLike) -> tuple[str, Factory | None] | OptimizerSpec:
    """Return the entry's label and factory (None for steepest's names), or an `OptimizerSpec` unchanged."""
    if isinstance(entry, OptimizerSpec):
        return entry
    if isinstance(entry, str):
        return entry, None
    if isinstance(entry, tuple):
        if len(entry) == 2 and isinstance(entry[0], str) and callable(entry[1]):
            return entry
    elif callable(entry):
        name = getattr(entry, "__name__", "<partial>")
        if name.startswith("<"):
            raise LabError(f"an optimizer has no name: pass it as ('label', {_short_repr(entry)})")
        return name, entry
    raise LabError(
        f"an optimizer must be a name, a class or a (label, factory) pair, not {_short_repr(entry)}"
    )


def _resolve(label: str, factory: Factory | None, model: nn.Module) -> OptimizerSpec:
    builder = _build_by_name(label) if factory is None else _build_by_factory(factory)
    try:
        optimizer = builder(model, None)
        defaults = optimizer.defaults
        required = _required_argument(optimizer.step)
    except (AttributeError, TypeError, ValueError) as error:
        raise LabError(str(error) if factory is None else f"{label}: {error}") from error
    if not isinstance(optimizer, Optimizer):
        raise LabError(f"{label}: its factory returned {_short_repr(optimizer)}, not a torch.optim.Optimizer")
    if required:
        raise LabError(f"{label} cannot race: its step() needs {required!r}, which the race does not pass")
    lr = defaults.get("lr")
    if not isinstance(lr, int | float | torch.Tensor) or not float(lr) > 0:
        raise LabError(f"{label} has no positive default lr, which the search starts from")
    try:
        builder(model, float(lr))
    except (TypeError, ValueError) as error:
        raise LabError(f"{label}: it must accept lr= for the search: {error}") from error
    hyper = {name: to_json_value(value) for name, value in defaults.items() if name != "lr"}
    return OptimizerSpec(label, builder, float(lr), hyper)


def _required_argument(call: Callable[..., Any]) -> str | None:
    """Return the first argument without a default."""
    for parameter in inspect.signature(call).parameters.values():
        if parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            return parameter.name
    return None


def _build_by_name(name: str) -> Builder:
    # `build` gives each tensor a suitable rule, because matrix rules do not support all tensors.
    return lambda model, lr: steepest.build(model, name, lr=lr)


def _build_by_factory(factory: Factory) -> Builder:
    return lambda model, lr: factory(trainable(model), **({} if lr is None else {"lr": lr}))


def _known_names() -> str:
    return f"steepest has {', '.join(steepest.list_optimizers())}"


def _short_repr(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"a {type(value).__name__}"


def to_json_value(value: Any) -> Any:
    """Convert a value to plain JSON types; values of other types become strings.

    Example:
        >>> to_json_value({"betas": (0.9, 0.99), "dtype": torch.float32})
        {'betas': [0.9, 0.99], 'dtype': 'torch.float32'}
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [to_json_value(item) for item in value]
    return str(value)
