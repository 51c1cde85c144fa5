"""Optimizers of several rules: classes whose names say which, such as ``Muon+AdamW``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from steepest.optimizer import OPTIMIZERS, Optimizer
from steepest.rule import Group, find_rule

__all__ = ["combined_class"]


def combined_class(base: type[Optimizer], groups: Iterable[Group]) -> type[Optimizer]:
    """Return a subclass of ``base`` that is named after the rules of these groups, in their order.

    Loggers and monitors show an optimizer's class. Instances pickle and copy as those of any class do.

    >>> combined_class(Optimizer, [{"rule": "muon"}, {"rule": "adamw"}, {"rule": "adamw"}]).__name__
    'Muon+AdamW'
    """
    return _combined(base, tuple(dict.fromkeys(group["rule"] for group in groups)))


_MADE: dict[tuple[type[Optimizer], tuple[str, ...]], type[Optimizer]] = {}


def _combined(base: type[Optimizer], rules: tuple[str, ...]) -> type[Optimizer]:
    def __reduce__(self: Optimizer) -> Any:
        # pickle finds a class by its name in a module, where this one is not.
        return _blank, (base, rules), self.__getstate__()

    if (base, rules) not in _MADE:
        attributes = {"__module__": base.__module__, "__doc__": base.__doc__, "__reduce__": __reduce__}
        _MADE[base, rules] = type("+".join(map(_class_name, rules)), (base,), attributes)
    return _MADE[base, rules]


def _class_name(rule: str) -> str:
    known = OPTIMIZERS.get(find_rule(rule).name)
    # The rule of ternary layers has no class of its own.
    return known.__name__ if known is not None else rule.title().replace("_", "")


def _blank(base: type[Optimizer], rules: tuple[str, ...]) -> Optimizer:
    cls = _combined(base, rules)
    return cls.__new__(cls)
