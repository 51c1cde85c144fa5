"""The data of a step: parameters with their gradients and state, in batches of equal configuration."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from steepest.engine.layout import Extent, Row
from steepest.engine.update import UpdateConfig
from steepest.random import Key
from steepest.rule import Group, Scalar

__all__ = ["ParamBatch", "ParamUpdate", "describe", "name_of"]


@dataclass(slots=True, eq=False)
class ParamUpdate:
    """One parameter with its gradient in this step.

    Attributes:
        group, group_index, index: where the parameter stands.
        word: with the step count and the element's place it keys noise: a hash of the parameter's name, so
            that an optimizer of some of the parameters draws what one of all draws; without names its
            number among all parameters.
        owner: the parameter as the user has it.
        param, grad: real views. A step tracks no gradients, so they need not be detached.
        state: the parameter's.
        columns: (param, grad, state entries per element…), once the state is made.
        step: the number of the step being taken.
        key: of the noise, where the step count is a device's; else None.
        scalars: the step's numbers for the rule.
        measured: the per-tensor state after the step.
        target: what the parameter stands for, where its rule moves that.
        extent: the places of the local shard if the owner is a DTensor, else None. ``param``, ``grad`` and
            ``state`` are then local.
        first: the index of the shard's first element in each dimension.
        units: its matrices, if several processes share the work on them.
    """

    group: Group
    group_index: int
    index: int
    word: int
    owner: Tensor
    param: Tensor
    grad: Tensor
    state: MutableMapping[str, Any]
    columns: list[Tensor] = field(default_factory=list)
    step: Scalar = 0
    key: Key | None = None
    scalars: Mapping[str, Scalar] = field(default_factory=dict)
    measured: Mapping[str, Scalar] | None = None
    target: Any = None
    extent: Extent | None = None
    first: tuple[int, ...] = ()
    units: Sequence[Any] | None = None

    @property
    def name(self) -> str:
        """The parameter's description in messages."""
        return describe(self.group, self.group_index, self.index)

    @property
    def label(self) -> str | None:
        """The name given by the user, or None."""
        return name_of(self.group, self.index)


@dataclass(slots=True, eq=False)
class ParamBatch:
    """Parameters of one group that share dtypes, device and configuration.

    Attributes:
        rows: the members' rows for element passes, if it is a kept :class:`~steepest.engine.plan.Plan`'s;
            the members then have their state.
    """

    config: UpdateConfig
    members: list[ParamUpdate]
    rows: list[Row] | None = None


def check_names(who: str, names: Any) -> None:
    """Raise ``ValueError``, beginning with ``who``, for a group's ``param_names`` that are no names."""
    if names is not None and not (
        isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    ):
        raise ValueError(f"{who}: param_names must be a list of names, got {names!r}")


def name_of(group: Group, index: int) -> str | None:
    """Return the name that the user gave a parameter, or None; one put into the list later has none."""
    names: Sequence[str] = group.get("param_names") or ()
    return names[index] if index < len(names) else None


def describe(group: Group, group_index: int, index: int) -> str:
    """Return a parameter's name if the user gave one, else its position."""
    name = name_of(group, index)
    if name is not None:
        return f"parameter {name!r}"
    shape = tuple(group["params"][index].shape)
    return f"parameter {index} of group {group_index} (shape {shape})"
