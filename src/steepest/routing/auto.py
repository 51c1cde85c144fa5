"""Auto: build() as a class, for callers that take an optimizer's class or the path of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from steepest.combined import combined_class
from steepest.optimizer import Optimizer
from steepest.routing.build import form_groups, warn_of_no_matrix
from steepest.routing.model import model_of

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
        model: the same as ``params``, for callers that pass it by this name.
        lr, weight_decay: of the main rule; None means the rule's default.
        fallback: name of the rule for the other tensors, or a dict of group options including ``"rule"``.
        **options: all other arguments of :func:`steepest.build`.

    Raises:
        TypeError: tensors or groups from which no model can be told, with what to do instead.
        TypeError, ValueError: as :func:`steepest.build`.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> optimizer = Auto(model.parameters(), "muon", lr=1e-3)
    >>> isinstance(optimizer, Auto), type(optimizer).__name__
    (True, 'Muon+AdamW')
    """

    def __init__(
        self,
        params: Any = None,
        rule: str = "muon",
        *,
        model: Any = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        fallback: str | Mapping[str, Any] = "adamw",
        **options: Any,
    ) -> None:
        if model is not None and params is not None:
            raise TypeError("Auto() takes the model or params, not both")
        found: nn.Module = model_of("Auto()", model if params is None else params)
        if weight_decay is not None:
            options["weight_decay"] = weight_decay
        formed = form_groups(found, rule, lr=lr, fallback=fallback, **options)
        self.__class__ = combined_class(type(self), formed.groups)  # type: ignore[assignment]
        super().__init__(formed.groups, **formed.main)
        formed.attach(self)
        warn_of_no_matrix(self, stacklevel=3)
