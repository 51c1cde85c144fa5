"""Groups of options as dataclasses: typer itself knows only single parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints


def grouped(command: Callable[..., int]) -> Callable[..., int]:
    """Return the command with the fields of its dataclass parameters in their place, each an option.

    A field with `init=False` is no option.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    names: dict[str, list[str]] = {}
    parameters = []
    for parameter in signature(command).parameters.values():
        found = [(parameter.name, hints, parameter.default)]
        if (group := groups.get(parameter.name)) is not None:
            own = get_type_hints(group, include_extras=True)
            options = [field for field in fields(group) if field.init]
            found = [(f.name, own, Parameter.empty if f.default is MISSING else f.default) for f in options]
            names[parameter.name] = [field.name for field in options]
        parameters += [
            Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
            for name, types, default in found
        ]

    @wraps(command)
    def call(**values: Any) -> int:
        made = {name: groups[name](**{key: values.pop(key) for key in keys}) for name, keys in names.items()}
        return command(**values, **made)

    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call
