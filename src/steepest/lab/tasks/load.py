"""Tasks by name, and tasks of your own from `package.module:attribute`."""

from __future__ import annotations

import importlib
import inspect
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..defaults import TASKS
from ..errors import LabError
from ..files import parse_path
from ..loading import load
from ..records import Metric
from .task import Split, Task

_FROM_TEXT = (int, float, bool, str, Path, type(None))


def load_task(
    name: str, settings: Mapping[str, str] | None = None, *, device: str | torch.device = "cpu"
) -> Task[Any]:
    """Return a built-in task, or your own.

    Your own is `package.module:attribute`, imported with the current folder on the path: a `Task`, or a
    callable that returns a `Task` or a triple (model, batches, loss), where `batches` is a list, a data set
    of batches or a DataLoader, and `loss(model, batch)` returns the scalar to minimize. From a triple the
    last tenth of the batches (at least one) becomes test data, the tenth before validation data, and the
    rest is trained on in an order given by the seed. The metric is the mean loss of the batches. The callable
    is called again for each trial, under the trial's seed, for a fresh model. Model and batches are moved to
    `device`, which the callable also receives if it has a parameter of that name.

    Args:
        name: "text", "digits", "images", "sasrec", or "package.module:attribute".
        settings: Arguments of the task's function as text, by name, such as {"model": "convnet"}.
        device: The training device.

    Raises:
        LabError: there is no such task, setting or value; the import fails; or the callable returns
            anything else, fewer than three batches, batches that can be read only once, or the same
            model again.
    """
    if name in TASKS:
        module = importlib.import_module(f"{__package__}.{name}")
        return cast("Task[Any]", _bind(name, getattr(module, f"{name}_task"), settings or {}, device)())
    if not all(name.partition(":")):
        raise LabError(
            f"unknown task {name!r}: choose {', '.join(TASKS)}, or your own as package.module:task"
        )
    found = load(name)
    if isinstance(found, Task):
        if settings:
            raise LabError(f"{name} is a Task, which has no settings: got {', '.join(settings)}")
        return found
    if not callable(found):
        raise LabError(f"{name} is neither a Task nor callable: {found!r}")
    build = _bind(name, found, settings or {}, device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        made = build()
        return made if isinstance(made, Task) else _from_triple(name, build, made, device)


def parse_settings(name: str, function: Callable[..., Any], settings: Mapping[str, str]) -> dict[str, Any]:
    """Convert settings to the types in the function's signature; `device` is no setting.

    A parameter without an annotation has the type of its default.

    Example:
        >>> def task(model: Literal["small", "large"] = "small", *, batch: int = 8): ...
        >>> parse_settings("mine", task, {"batch": "16"})
        {'batch': 16}
        >>> parse_settings("mine", task, {"bach": "16"})
        Traceback (most recent call last):
        steepest.lab.errors.LabError: mine has no setting 'bach': it has model, batch
    """
    hints = get_type_hints(function) if inspect.isroutine(function) else {}
    known: dict[str, Any] = {}
    for name_, parameter in inspect.signature(function).parameters.items():
        default = str if parameter.default in (parameter.empty, None) else type(parameter.default)
        hint = hints.get(name_, default)
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and name_ != "device" and _readable(hint):
            known[name_] = hint
    values = {}
    for key, text in settings.items():
        if key not in known:
            raise LabError(f"{name} has no setting {key!r}: it has {', '.join(known) or 'none'}")
        try:
            values[key] = TypeAdapter(known[key]).validate_strings(text)
        except ValidationError as error:
            raise LabError(f"{name}: {key}={text!r}: {error.errors()[0]['msg']}") from error
        if isinstance(values[key], Path):
            parse_path(text)
    return values


def _readable(hint: Any) -> bool:
    """Return whether a value of this type can be read from text."""
    if get_origin(hint) in (Union, types.UnionType):
        return all(map(_readable, get_args(hint)))
    return hint in _FROM_TEXT or get_origin(hint) is Literal


def _bind(
    name: str, function: Callable[..., Any], settings: Mapping[str, str], device: str | torch.device
) -> Callable[[], Any]:
    arguments = parse_settings(name, function, settings)
    if "device" in inspect.signature(function).parameters:
        arguments["device"] = device
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise LabError(f"{name}: {error}; give it as a setting") from error
    return lambda: function(**arguments)


def _from_triple(name: str, build: Callable[[], Any], made: Any, device: str | torch.device) -> Task[Any]:
    match made:
        case (nn.Module() as first, batches, loss) if callable(loss):
            data = _sequence(name, batches)
        case _:
            found = [type(item).__name__ for item in made] if isinstance(made, tuple) else type(made).__name__
            raise LabError(f"{name} must return a Task or (model, batches, loss); it returned {found}")
    if len(data) < 3:
        raise LabError(
            f"{name} has {len(data)} batches, but needs at least 3: for training, validation and test"
        )
    held_out = max(1, len(data) // 10)
    count = len(data) - 2 * held_out
    first_held_out: dict[Split, int] = {"validation": count, "test": count + held_out}
    original = weakref.ref(first)

    def make(seed: int) -> nn.Module:
        model: nn.Module = build()[0]
        if model is original():
            raise LabError(f"{name} returned the same, trained model again: build a new one in each call")
        return model.to(device)

    def ordered(seed: int) -> Iterator[Any]:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return (_move(data[index], device) for index in order.tolist())

    def evaluate(model: nn.Module, split: Split) -> dict[str, float]:
        start = first_held_out[split]
        losses = [loss(model, _move(data[start + n], device)).detach() for n in range(held_out)]
        return {"loss": torch.stack(losses).double().mean().item()}

    return Task(
        name=name,
        make=make,
        batches=ordered,
        loss=loss,
        evaluate=evaluate,
        metrics=(Metric(name="loss"),),
        config={"train_batches": count, "validation_batches": held_out, "test_batches": held_out},
    )


def _sequence(name: str, batches: Any) -> Sequence[Any]:
    """Return the batches as a sequence; a DataLoader's are read now, since it may shuffle at each pass."""
    if hasattr(batches, "__getitem__") and hasattr(batches, "__len__"):
        return cast("Sequence[Any]", batches)
    if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
        # An iterator can be read only once.
        raise LabError(f"{name}: its batches are a {type(batches).__name__}: return a list or a DataLoader")
    torch.manual_seed(0)  # of the generators that `load_task` has forked
    return list(batches)


def _move(batch: Any, device: str | torch.device) -> Any:
    if isinstance(batch, Mapping):  # among others Hugging Face's, which pytree does not know
        batch = dict(batch)
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
