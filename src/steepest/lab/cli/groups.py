"""Groups of options as dataclasses: typer itself knows only single parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints


def grouped(command: Callable[..., int]) -> Callable[..., int]:
    """Return the command with the fields of its dataclass parameters in their place, each an option.

    A field with `init=False` is no option.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, dict[str, Parameter]] = {}
    parameters: list[Parameter] = []
    for name, parameter in signature(command).parameters.items():
        if is_dataclass(hints[name]):
            types = get_type_hints(hints[name], include_extras=True)
            # A dataclass's signature has the fields in their order, with their defaults.
            own = signature(hints[name]).parameters.values()
            groups[name] = {p.name: p.replace(annotation=types[p.name], kind=p.KEYWORD_ONLY) for p in own}
            parameters += groups[name].values()
        else:
            parameters.append(parameter.replace(annotation=hints[name]))

    @wraps(command)
    def call(**values: Any) -> int:
        made = {name: hints[name](**{key: values.pop(key) for key in keys}) for name, keys in groups.items()}
        return command(**values, **made)

    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call
