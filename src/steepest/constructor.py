"""Constructors declared by a signature alone: the options of an optimizer, their types and defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

from typing_extensions import get_type_hints

from steepest.hyperparameters import near_miss
from steepest.rule import MATRIX_DEFAULTS, MatrixOptions, Rule

__all__ = ["check_name", "constructor", "signature_defaults", "spell_out"]

Init = TypeVar("Init", bound=Callable[..., None])
_KINDS = inspect.Parameter
_COMMON_TYPES = get_type_hints(MatrixOptions)


def constructor(declared: Init) -> Init:
    """Make an ``__init__`` from a signature without a body.

    It binds its arguments to the signature and passes them to ``Optimizer._construct``. Options in the
    signature's ``**`` have the defaults that the class inherits.
    """
    return cast(Init, _bound_by(declared, inspect.signature(declared)))


def check_name(name: str, cls: type, known: type) -> None:
    """Raise ``ValueError`` for a rule's name that another class than ``cls`` has."""
    taken, own = (f"{each.__module__}.{each.__qualname__}" for each in (known, cls))
    # Reloading a module defines the same class again, which is not a clash.
    if taken != own:
        raise ValueError(f"the rule name {name!r} is taken by {taken}")


def signature_defaults(cls: type, rule: Rule, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of a rule's options, from ``changed`` or else the nearest ``__init__``."""
    for name in changed:
        if name not in rule.hyper:
            raise TypeError(f"rule {rule.name!r} has no option {name}{near_miss(name, rule.hyper)}")
    given = {p.name: p.default for p in _parameters(cls) if p.default is not p.empty}
    given = {**MATRIX_DEFAULTS, **given, **changed}
    if missing := [name for name in rule.hyper if name not in given]:
        raise TypeError(f"{cls.__name__}.__init__ has no default for {', '.join(missing)}")
    return {name: given[name] for name in rule.hyper}


def spell_out(cls: type, defaults: Mapping[str, Any]) -> None:
    """Give the class an ``__init__`` whose signature names every option with its default.

    A class whose own or inherited ``__init__`` is not a :func:`constructor` keeps it.
    """
    declared = getattr(cls.__init__, "declared", None)  # type: ignore[misc]
    if declared is None:
        return
    signature = inspect.signature(declared)
    parameters = list(signature.parameters.values())
    rest = [parameters.pop()] if parameters[-1].kind is _KINDS.VAR_KEYWORD else []
    if "__init__" in cls.__dict__:
        # The class's own defaults take precedence over its rule's.
        defaults = {**defaults, **{p.name: p.default for p in parameters if p.default is not p.empty}}
    shown = [p.replace(default=defaults[p.name]) if p.name in defaults else p for p in parameters]
    if rest:
        types = _COMMON_TYPES | {p.name: p.annotation for p in _parameters(cls)}
        shown += [
            _KINDS(name, _KINDS.KEYWORD_ONLY, default=default, annotation=types.get(name, _KINDS.empty))
            for name, default in defaults.items()
            if name not in signature.parameters
        ]
    made = _bound_by(declared, signature.replace(parameters=[*shown, *rest]))
    if rest and "Unpack" in str(rest[0].annotation):
        # The signature shows every option. Other keywords are bound too, to be refused with a near miss.
        made.__signature__ = signature.replace(parameters=shown)
    cls.__init__ = made  # type: ignore[misc]


def _bound_by(declared: Callable[..., None], signature: inspect.Signature) -> Any:
    @wraps(declared)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}() {error}") from None
        bound.apply_defaults()
        first, *others = bound.arguments.items()
        options: dict[str, Any] = {}
        for name, value in others:
            options |= value if signature.parameters[name].kind is _KINDS.VAR_KEYWORD else {name: value}
        first[1]._construct(options.pop("params"), options)

    made = cast(Any, __init__)
    made.declared, made.__signature__ = declared, signature
    return made


def _parameters(cls: type) -> Iterator[inspect.Parameter]:
    """Yield the parameters of the constructors of a class and its bases, those of the bases first."""
    for each in reversed(cls.__mro__):
        if inspect.isfunction(init := each.__dict__.get("__init__")):
            yield from inspect.signature(getattr(init, "declared", init)).parameters.values()
