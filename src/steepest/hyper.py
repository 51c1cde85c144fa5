"""Hyper-parameters as data: a default, the values allowed, and the error for the others."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "Hyper",
    "at_least",
    "betas",
    "choice",
    "flag",
    "floating_dtype",
    "fraction",
    "integer",
    "learning_rate",
    "near_miss",
    "optional",
    "plain",
    "positive",
    "rate",
]


@dataclass(frozen=True)
class Hyper:
    """One hyper-parameter of a rule.

    Args:
        default: the value a param group gets when it names none.
        accepts: whether a value is allowed.
        allowed: the allowed values in words, for the error message.
    """

    default: Any
    accepts: Callable[[Any], bool]
    allowed: str

    @property
    def traced(self) -> bool:
        """Whether it reaches compiled code as data, so that a schedule never recompiles."""
        first = self.default[0] if isinstance(self.default, tuple) else self.default
        return isinstance(first, float)

    def check(self, owner: str, name: str, value: Any) -> None:
        """Raise ``ValueError`` naming ``owner``, ``name`` and ``value`` unless the value is allowed."""
        try:
            fine = self.accepts(value)
        except (TypeError, ValueError, RuntimeError):
            fine = False
        if not fine:
            raise ValueError(f"{owner}: {name} must be {self.allowed}, got {value!r}")


def _number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def plain(value: Any) -> Any:
    """Numbers and sequences of other libraries as Python's own, which a checkpoint loads without trust.

    >>> import collections
    >>> plain(collections.UserList([0.9, 0.99]))
    (0.9, 0.99)
    """
    if isinstance(value, (bool, int, float, str, bytes, dict, torch.Tensor, torch.dtype)) or value is None:
        return value
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Sequence) and not isinstance(value, (list, tuple)):
        return tuple(plain(item) for item in value)
    return value


def learning_rate(default: float) -> Hyper:
    """A finite number ≥ 0, or a tensor of one element (whose value is not read here: that would sync)."""

    def accepts(value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return value.numel() == 1 and (value.device.type != "cpu" or bool(0 <= value < math.inf))
        return _number(value) and value >= 0

    return Hyper(default, accepts, "a finite number ≥ 0 or a 1-element tensor")


def at_least(low: float, default: float) -> Hyper:
    """A finite number ≥ ``low``."""
    return Hyper(default, lambda value: _number(value) and value >= low, f"a finite number ≥ {low:g}")


def positive(default: float) -> Hyper:
    """A finite number > 0."""
    return Hyper(default, lambda value: _number(value) and value > 0, "a finite number > 0")


def fraction(default: float, *, closed: bool = False) -> Hyper:
    """A number in [0, 1), or in [0, 1] when ``closed``."""
    if closed:
        return Hyper(default, lambda value: _number(value) and 0 <= value <= 1, "a number in [0, 1]")
    return Hyper(default, lambda value: _number(value) and 0 <= value < 1, "a number in [0, 1)")


def rate(default: float) -> Hyper:
    """A number in (0, 1]."""
    return Hyper(default, lambda value: _number(value) and 0 < value <= 1, "a number in (0, 1]")


def betas(default: tuple[float, float]) -> Hyper:
    """Two numbers in [0, 1)."""

    def accepts(value: Any) -> bool:
        return (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and len(value) == len(default)
            and all(_number(beta) and 0 <= beta < 1 for beta in value)
        )

    return Hyper(default, accepts, f"{len(default)} numbers in [0, 1)")


def integer(default: int, low: int, high: int | None = None) -> Hyper:
    """An integer ≥ ``low`` (and ≤ ``high``)."""

    def accepts(value: Any) -> bool:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return bool(whole and value >= low and (high is None or value <= high))

    return Hyper(default, accepts, f"an integer ≥ {low}" + ("" if high is None else f" and ≤ {high}"))


def choice(default: Any, *values: Any) -> Hyper:
    """One of ``values``."""
    words = ", ".join(map(repr, values))

    def accepts(value: Any) -> bool:
        # 1 == True, but a 1 is not what an option of True, False and None means.
        return any(type(value) is type(known) and value == known for known in values)

    return Hyper(default, accepts, f"one of {words}")


def flag(default: bool) -> Hyper:
    """A bool."""
    return Hyper(default, lambda value: isinstance(value, bool), "True or False")


def floating_dtype() -> Hyper:
    """None or a floating point dtype with a sign and a zero."""

    def accepts(value: Any) -> bool:
        if value is None:
            return True
        # Among the narrow formats some hold exponents only, or two numbers a byte.
        signed = value not in (torch.float8_e8m0fnu, torch.float4_e2m1fn_x2)
        return isinstance(value, torch.dtype) and value.is_floating_point and signed

    return Hyper(None, accepts, "None or a signed torch floating point dtype")


def optional(hyper: Hyper) -> Hyper:
    """The same, or None, which becomes the default."""
    return Hyper(None, lambda value: value is None or hyper.accepts(value), f"None or {hyper.allowed}")


def near_miss(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'lion'?)"`` when a known name is close to ``name``, else the empty string."""
    close = difflib.get_close_matches(str(name).lower(), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_all(owner: str, table: Mapping[str, Hyper], values: Mapping[str, Any]) -> None:
    """Check every value whose name stands in the table."""
    for name, hyper in table.items():
        if name in values:
            hyper.check(owner, name, values[name])
