"""What the user says of tensors by name: globs, each of which must match."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from steepest.hyperparameters import near_miss
from steepest.routing.tensors import Routed

__all__ = ["as_options", "as_table", "matching", "require_matches"]


def as_options(what: str, value: str | Mapping[str, Any]) -> dict[str, Any]:
    """A rule's name, or a dict of group options, as a dict.

    Raises:
        TypeError: it is neither, or the dict has a key that is no option's name.
    """
    if isinstance(value, str):
        return {"rule": value}
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return dict(value)
    raise TypeError(f"{what} must be a rule's name or a dict of group options, got {value!r}")


def as_table(what: str, value: Any) -> dict[str, Any]:
    """A mapping of globs to whatever, as a dict; None is an empty one.

    Raises:
        TypeError: it is none, or a key is no string.
    """
    if value is None:
        return {}
    if isinstance(value, Mapping) and all(isinstance(glob, str) for glob in value):
        return dict(value)
    raise TypeError(f"{what} must be a dict from globs of parameter names, got {value!r}")


def matching(table: Mapping[str, Any], tensor: Routed) -> list[str]:
    """The globs of ``table``, in its order, that match one of the tensor's names."""
    return [glob for glob in table if any(glob == name or fnmatchcase(name, glob) for name in tensor.names)]


def require_matches(what: str, table: Mapping[str, Any], tensors: list[Routed]) -> None:
    """Raise ``ValueError``, with a near miss, for a glob in ``table`` that matches no parameter."""
    names = [name for tensor in tensors for name in tensor.names]
    ends = {
        ".".join(["*", *name.split(".")[cut:]]) for name in names for cut in range(1, name.count(".") + 1)
    }
    for glob in table:
        if not any(glob == name or fnmatchcase(name, glob) for name in names):
            close = near_miss(glob, sorted(ends) if "*" in glob else names)
            raise ValueError(f"{what}: {glob!r} matches no parameter of the model{close}")
