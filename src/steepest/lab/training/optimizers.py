"""The optimizers of an experiment: names of ours, and anybody's as `module:attribute`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import steepest

from ..errors import LabError
from ..loading import load
from ..printable import printable

Factory = Callable[..., Optimizer]
"""Called as `factory(params, **hyperparameters)`."""

Builder = Callable[[nn.Module, Mapping[str, Any]], Optimizer]
"""Builds an optimizer for a model; hyper-parameters that are not given have the optimizer's defaults."""


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer that is built anew for every trial."""

    label: str
    builder: Builder
    hyperparameters: Mapping[str, Any]
    """All hyper-parameters at their defaults, lr included, as plain JSON values."""
    entry: str = ""
    """How the request named it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters that the request fixed."""
    fixed: tuple[str, ...] = ()
    """Hyper-parameters that `builder` does not accept, so that they cannot be searched."""
    changes_model: bool = False
    """Whether `builder` modifies the model, so that other optimizers cannot share it."""

    @property
    def default_lr(self) -> float:
        """The learning rate without a search."""
        return float(self.hyperparameters["lr"])

    def build(self, model: nn.Module, values: Mapping[str, Any]) -> Optimizer:
        """Build a fresh optimizer for the model's trainable parameters."""
        return self.builder(model, {**self.settings, **values})


OptimizerLike = str | Factory | tuple[str, Factory] | OptimizerSpec
"""`name`, `module:attribute`, `label=name`, a class, a (label, factory) pair, or an `OptimizerSpec`."""


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def resolve_optimizers(
    entries: OptimizerLike | Iterable[OptimizerLike],
    model: nn.Module,
    settings: Sequence[str] = (),
) -> list[OptimizerSpec]:
    """Build every optimizer once, so that a bad entry fails before any time is spent on training.

    Args:
        entries: `muon` and the other names of `steepest.list_optimizers()`, built by `steepest.build`;
            `torch.optim:AdamW` or any `module:attribute` called as `factory(params, **hyperparameters)`;
            `label=entry` for a second variant of the same optimizer; optimizer classes and
            (label, factory) pairs. A single entry need not be in a list.
        model: The model to be trained, with which no optimizer takes a step here.
        settings: Hyper-parameters as `label.name=value`, where the value is JSON or a string.

    Raises:
        LabError: no entries, a duplicate label, an unknown name, no default lr, an optimizer that
            rejects the model or a hyper-parameter, or one that needs a closure.
    """
    if isinstance(entries, str) or not isinstance(entries, Iterable):
        entries = [entries]
    listed = [*entries]
    if not listed:
        names = ", ".join(steepest.list_optimizers())
        raise LabError(f"no optimizers: name at least one, such as 'adamw'; steepest has {names}")
    labels = [printable(_label(entry)) for entry in listed]
    if not all(label.strip() for label in labels):
        raise LabError("an optimizer has no label: write label=name for a variant")
    for label in labels:
        if labels.count(label) > 1:
            raise LabError(f"optimizer {label!r} is listed twice; write other={label} for a variant")
    fixed = _parse_settings(settings, labels)
    return [_resolve(entry, label, model, fixed[label]) for entry, label in zip(listed, labels, strict=True)]


def _label(entry: OptimizerLike) -> str:
    match entry:
        case OptimizerSpec():
            return entry.label
        case str():
            return entry.partition("=")[0]
        case (str() as label, factory) if callable(factory):
            return label
    if not callable(entry):
        raise LabError(
            f"an optimizer must be a name, a class or a (label, factory) pair, not {_short_repr(entry)}"
        )
    name = getattr(entry, "__name__", "<partial>")
    if name.startswith("<"):
        raise LabError(f"an optimizer has no name: pass it as ('label', {_short_repr(entry)})")
    return str(name)


def _parse_settings(settings: Sequence[str], labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    fixed: dict[str, dict[str, Any]] = {label: {} for label in labels}
    for setting in settings:
        target, equals, text = setting.partition("=")
        # A label such as torch.optim:AdamW has dots itself.
        label, dot, name = target.rpartition(".")
        if not (equals and dot and name) or label not in fixed:
            raise LabError(
                f"bad setting {setting!r}: write OPTIMIZER.NAME=VALUE, with one of {', '.join(labels)}"
            )
        try:
            value = json.loads(text)
        except ValueError:  # also for integers of more than 4300 digits
            value = text
        fixed[label][name] = tuple(value) if isinstance(value, list) else value
    return fixed


def _resolve(
    entry: OptimizerLike, label: str, model: nn.Module, settings: Mapping[str, Any]
) -> OptimizerSpec:
    if isinstance(entry, OptimizerSpec):
        if settings:
            raise LabError(f"{label} is an OptimizerSpec: set its hyper-parameters there")
        return entry
    if isinstance(entry, str):
        written = entry.partition("=")[2] or entry
        # `build` gives each tensor a suitable rule, because matrix rules do not support all tensors.
        builder = (
            _from_factory(load_factory(written))
            if ":" in written
            else lambda model, values: steepest.build(model, written, **values)
        )
    else:
        factory = entry[1] if isinstance(entry, tuple) else entry
        written, builder = getattr(factory, "__qualname__", label), _from_factory(factory)
    try:
        optimizer = builder(model, settings)
        defaults = optimizer.defaults
    except (AttributeError, TypeError, ValueError) as error:
        raise LabError(str(error) if label in str(error) else f"{label}: {error}") from error
    if not isinstance(optimizer, Optimizer):
        raise LabError(f"{label}: its factory returned {_short_repr(optimizer)}, not a torch.optim.Optimizer")
    try:
        signature(optimizer.step).bind()
    except TypeError as error:
        raise LabError(f"{label} cannot be trained here: its step() is {error}") from error
    lr = defaults.get("lr")
    if not isinstance(lr, int | float | torch.Tensor) or not 0 < lr < 1e308:
        raise LabError(f"{label} has no positive, finite default lr, which the search starts from")
    try:
        builder(model, {**settings, "lr": float(lr)})
    except (TypeError, ValueError) as error:
        raise LabError(f"{label}: it must accept lr= for the search: {error}") from error
    # Optimizers may have further defaults for torch's schedulers alone.
    options = {name for group in optimizer.param_groups for name in group}
    values = {name: to_json_value(value) for name, value in defaults.items() if name in options}
    fixed: tuple[str, ...] = ()
    try:
        builder(model, {"weight_decay": defaults.get("weight_decay"), **settings})
    except TypeError:
        # A factory may set the decay itself.
        fixed = ("weight_decay",)
    return OptimizerSpec(label, builder, {**values, "lr": float(lr)}, written, dict(settings), fixed)


def load_factory(entry: str) -> Factory:
    """Import the class or factory that `module:attribute` names, or raise ``LabError``."""
    value = load(entry)
    if not callable(value):
        raise LabError(f"{entry!r} is {_short_repr(value)}, not a class or a factory")
    return value  # type: ignore[no-any-return]


def _from_factory(factory: Factory) -> Builder:
    def build(model: nn.Module, values: Mapping[str, Any]) -> Optimizer:
        parameters = trainable(model)
        optimizer = factory(parameters, **values)
        if not getattr(optimizer, "defaults", {}).get("weight_decay"):
            return optimizer
        # As `steepest.build` does: gains and biases are not decayed.
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return factory([group for group in groups if group["params"]], **values)

    return build


def _short_repr(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"a {type(value).__name__}"


def to_json_value(value: Any) -> Any:
    """Convert a value to plain JSON types; values of other types become strings.

    Example:
        >>> to_json_value({"betas": (0.9, 0.99), "dtype": torch.float32})
        {'betas': [0.9, 0.99], 'dtype': 'torch.float32'}
    """

    def plain(other: object) -> object:
        if isinstance(other, torch.Tensor) and other.ndim == 0:
            return other.item()
        return dict(other) if isinstance(other, Mapping) else str(other)

    return json.loads(json.dumps(value, default=plain))
