"""Patterns: what the user says about tensors by name, with shell wildcards (``fnmatch``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from steepest.hyperparameters import near_miss
from steepest.routing.tensors import Routed

__all__ = ["as_options", "as_table", "matching", "require_matches"]


def as_options(what: str, value: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return group options as a dict; a string is the name of a rule.

    Raises:
        TypeError: the value is neither a string nor a dict with string keys.
    """
    if isinstance(value, str):
        return {"rule": value}
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return dict(value)
    raise TypeError(f"{what} must be a rule's name or a dict of group options, got {value!r}")


def as_table(what: str, value: Any) -> dict[str, Any]:
    """Return a mapping from patterns as a dict; None is an empty one.

    Raises:
        TypeError: the value is not a mapping, or a key is not a string.
    """
    if value is None:
        return {}
    if isinstance(value, Mapping) and all(isinstance(pattern, str) for pattern in value):
        return dict(value)
    raise TypeError(f"{what} must be a dict whose keys are patterns of parameter names, got {value!r}")


def matching(table: Mapping[str, Any], tensor: Routed) -> list[str]:
    """The patterns of ``table``, in its order, that match one of the tensor's names."""
    return [pattern for pattern in table if _matches(pattern, tensor.names)]


def require_matches(what: str, table: Mapping[str, Any], tensors: list[Routed]) -> None:
    """Raise ``ValueError``, with a near miss, for a pattern in ``table`` that matches no parameter."""
    names = [name for tensor in tensors for name in tensor.names]
    ends = {
        ".".join(["*", *name.split(".")[cut:]]) for name in names for cut in range(1, name.count(".") + 1)
    }
    for pattern in table:
        if not _matches(pattern, names):
            close = near_miss(pattern, sorted(ends) if "*" in pattern else names)
            raise ValueError(f"{what}: {pattern!r} matches no parameter of the model{close}")


def _matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether the pattern is one of the names or matches one: a name may contain brackets itself."""
    return any(pattern == name or fnmatchcase(name, pattern) for name in names)
