"""From param groups to batches: what will be stepped, with what it needs, before anything changes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steepest.random import Key
from steepest.rule import Group, MatrixRule, Rule, Scalar, find_rule

__all__ = [
    "ParamBatch",
    "ParamUpdate",
    "Place",
    "away",
    "collect",
    "describe",
    "member_at",
    "real_view",
    "refuse_shards",
]

_PLAIN = (Tensor, torch.nn.Parameter)
LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(slots=True)
class Place:
    """Where a parameter stands: its group, its index there, and its ordinal among all parameters."""

    group_index: int
    index: int
    ordinal: int


@dataclass(slots=True)
class ParamUpdate:
    """One parameter with its gradient in this step.

    ``scalars`` are the step's numbers for the rule's update, ``measured`` the per-tensor state after it.
    ``param`` and ``grad`` are real views; a step, which tracks no gradients, need not detach them. The
    place's ordinal, with the step count and the element's index, keys the parameter's noise; ``key`` is
    what comes of the two where the step count is a device's, else None.
    """

    group: Group
    place: Place
    owner: Tensor
    param: Tensor
    grad: Tensor
    state: MutableMapping[str, Any]
    step: Scalar = 0
    key: Key | None = None
    scalars: dict[str, Scalar] = field(default_factory=dict)
    measured: Mapping[str, Scalar] | None = None

    @property
    def name(self) -> str:
        """What describes it for people."""
        return describe(self.group, self.place.group_index, self.place.index)

    @property
    def label(self) -> str | None:
        """The name that the user gave."""
        return self.group["param_names"][self.place.index] if "param_names" in self.group else None


@dataclass
class ParamBatch:
    """Parameters of one group that share device and dtypes, and so one compiled graph."""

    rule: Rule
    group: Group
    members: list[ParamUpdate]
    _factor_sizes: dict[tuple[int, ...], dict[str, int]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the step is taken: with the parameters, or on the host with what is offloaded."""
        return torch.device("cpu") if self.offloaded else self.members[0].param.device

    @property
    def offloaded(self) -> bool:
        """Whether the step is taken on the host with parameters that live elsewhere."""
        return self.group["state_device"] == "cpu" and away(self.members[0].param.device)

    @functools.cached_property
    def state_names(self) -> frozenset[str]:
        """The state that the rule keeps for a parameter with the group's present options."""
        # Not on the meta device, which takes ten times as long to make a tensor as the step's own checks.
        blank = torch.empty(0, device="cpu", dtype=self.members[0].param.dtype)
        return frozenset(self.rule.init_state(blank, self.group))

    def factor_sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        """How many elements each factor of a matrix of this shape has, for a matrix rule."""
        if shape not in self._factor_sizes:
            assert isinstance(self.rule, MatrixRule)
            dtype = self.members[0].param.dtype
            blanks = self.rule.init_factors(shape, dtype, torch.device("meta"), self.group)
            self._factor_sizes[shape] = {name: blank.numel() for name, blank in blanks.items()}
        return self._factor_sizes[shape]

    @property
    def element_state(self) -> list[str]:
        """The state entries of the parameter's shape, in a fixed order."""
        return sorted(self.state_names - self.rule.tensor_state)

    @property
    def rounds_stochastically(self) -> bool:
        """Whether parameters are rounded with noise."""
        return self.group["rounding"] == "stochastic" and self.members[0].param.dtype in LOW_PRECISION

    @property
    def noisy(self) -> bool:
        """Whether the step draws noise."""
        return not self.rule.takes.isdisjoint({"noise", "key"}) or self.rounds_stochastically

    @property
    def counts_steps(self) -> bool:
        """Whether the parameters' state needs a step count."""
        return self.rule.counts_steps or self.rounds_stochastically

    @property
    def counts_on_device(self) -> bool:
        """Whether only the device knows how many steps were taken: it may skip one, or repeat a graph."""
        skips = self.group["nonfinite"] == "skip" and self.device.type != "cpu"
        return skips or bool(self.group["capturable"])


def real_view(tensor: Tensor) -> Tensor:
    """The tensor without its graph, complex numbers as pairs of reals: shape [...] becomes [..., 2]."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def is_shard(param: Tensor) -> bool:
    """Whether it is a DTensor."""
    # Importing torch.distributed.tensor takes a second; a DTensor can exist only where it is imported.
    if type(param) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(param, module.DTensor)


def refuse_shards(who: str, param: Tensor) -> None:
    """Raise ``ValueError`` for a DTensor."""
    if is_shard(param):
        raise ValueError(f"{who} is a DTensor: sharded parameters are not supported yet")


def describe(group: Group, group_index: int, index: int) -> str:
    """A parameter's name if the user gave one, else where it stands."""
    if "param_names" in group:
        return f"parameter {group['param_names'][index]!r}"
    shape = tuple(group["params"][index].shape)
    return f"parameter {index} of group {group_index} (shape {shape})"


def away(device: torch.device) -> bool:
    """Whether a tensor there must be copied for the host to compute with it."""
    return device.type != "cpu"


def member_at(group: Group, place: Place, state: MutableMapping[str, Any]) -> ParamUpdate:
    """The parameter of a group at a place, which has a gradient, as a member of this step."""
    owner: Tensor = group["params"][place.index]
    grad = owner.grad
    assert grad is not None
    # Frameworks put other tensors into the groups after construction.
    if is_shard(owner):
        refuse_shards(describe(group, place.group_index, place.index), owner)
    if grad.layout is not torch.strided:
        grad = grad.to_dense()
    if owner.is_complex():
        return ParamUpdate(group, place, owner, real_view(owner), real_view(grad), state)
    return ParamUpdate(group, place, owner, owner, grad, state)


def collect(
    groups: Iterable[dict[str, Any]], state: Callable[[Tensor], MutableMapping[str, Any]]
) -> list[ParamBatch]:
    """All parameters that have a gradient, batched by group, device and dtypes.

    Args:
        groups: an optimizer's param groups.
        state: gives a parameter's state without creating an entry for it.
    """
    batches: list[ParamBatch] = []
    ordinal = 0
    seen: set[int] = set()
    for group_index, group in enumerate(groups):
        rule = find_rule(group["rule"])
        by_kind: dict[tuple[torch.device, torch.dtype, torch.dtype], list[ParamUpdate]] = {}
        first = ordinal
        ordinal += len(group["params"])
        for index, owner in enumerate(group["params"]):
            if owner.grad is None or id(owner) in seen:
                continue
            seen.add(id(owner))
            member = member_at(group, Place(group_index, index, first + index), state(owner))
            kind = (member.param.device, member.param.dtype, member.grad.dtype)
            if kind in by_kind:
                by_kind[kind].append(member)
            else:
                by_kind[kind] = [member]
        batches.extend(ParamBatch(rule, group, members) for members in by_kind.values())
    return batches
