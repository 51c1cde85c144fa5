"""Auto: build() as a class, for callers that take an optimizer's class or the path of one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

from steepest.combined import combined_class
from steepest.constructor import constructor
from steepest.optimizer import Optimizer
from steepest.routing.build import build, form_groups, warn_of_no_matrix
from steepest.routing.layers import LayerDecay
from steepest.routing.model import model_of
from steepest.views import View

__all__ = ["Auto"]


class Auto(Optimizer):
    """:func:`steepest.build` as a class: one optimizer with the right rule for each tensor of a model.

    ``Auto(model, rule, **options)`` is the optimizer that ``steepest.build(model, rule, **options)`` returns,
    and an instance of this class. Callers that know an optimizer only by its class, or by the path
    ``steepest.Auto``, may pass ``model.parameters()`` in place of the model: an unread iterator of torch's
    own knows its model. So LightningCLI's ``--optimizer steepest.Auto`` works as it is, and so does Hydra's
    ``_target_: steepest.Auto`` with ``_partial_: true``.

    State: that of the groups' rules; ``explain()`` shows the bytes per rule.

    Args:
        params: the model, or an unread ``model.parameters()`` or ``model.named_parameters()``.
        rule: name of the main rule.
        lr, fallback, fallback_lr, overrides, views, decay_vectors, layer_decay, ternary, memory: as for
            :func:`steepest.build`.
        hyper: further options of the main rule, for configurations that know only the arguments named here.
        **options: the same as keywords, and common options, such as ``weight_decay=0.1``.

    Raises:
        TypeError: tensors or groups from which no model can be told, with what to do instead; ``hyper`` is
            not a dict, or contains an argument that is named here or given as a keyword.
        TypeError, ValueError: as :func:`steepest.build`.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> optimizer = Auto(model.parameters(), "muon", lr=1e-3)
    >>> isinstance(optimizer, Auto), type(optimizer).__name__
    (True, 'Muon+AdamW')
    """

    @constructor
    def __init__(
        self,
        params: Any,
        rule: str = "muon",
        *,
        lr: float | None = None,
        weight_decay: float | None = None,
        fallback: str | Mapping[str, Any] = "adamw",
        fallback_lr: float | None = None,
        overrides: Mapping[str, str | Mapping[str, Any]] | None = None,
        views: Mapping[str, View | None] | None = None,
        decay_vectors: bool = False,
        layer_decay: LayerDecay | None = None,
        ternary: Mapping[str, Any] | bool | None = None,
        memory: Literal["least", "counts", "momentum"] | None = None,
        hyper: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None: ...

    def _construct(self, params: Any, options: dict[str, Any]) -> None:
        hyper = options.pop("hyper")
        if hyper is not None:
            _check_hyper(hyper, options)
            options |= hyper
        if options["weight_decay"] is None:
            del options["weight_decay"]
        formed = form_groups(model_of("Auto()", params), **options)
        self.__class__ = combined_class(type(self), formed.groups)  # type: ignore[assignment]
        Optimizer.__init__(self, formed.groups, **formed.main)
        formed.attach(self)
        warn_of_no_matrix(self, stacklevel=4)


def _check_hyper(hyper: Any, options: Mapping[str, Any]) -> None:
    """Raise ``TypeError`` for a ``hyper`` that is no dict, or that holds other arguments."""
    if not (isinstance(hyper, Mapping) and all(isinstance(name, str) for name in hyper)):
        raise TypeError(f"Auto(): hyper must be a dict of options, got {hyper!r}")
    own = {"weight_decay", *inspect.signature(build).parameters} - {"hyper"}
    for name in hyper:
        if name in own:
            raise TypeError(f"Auto(): {name!r} is an argument of its own and does not go into hyper")
        if name in options:
            raise TypeError(f"Auto(): {name!r} is given both in hyper and as a keyword")
