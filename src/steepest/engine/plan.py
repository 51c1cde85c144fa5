"""Keep a step's batches for the next step, as long as nothing has changed that they were made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from steepest.engine.batches import ParamBatch, ParamUpdate
from steepest.engine.layout import Row, flattened
from steepest.engine.update import PLAIN
from steepest.rule import Group

__all__ = ["Plan"]

# Stands for a gradient between two steps.
_GONE = torch.empty(0, device="cpu")

_values: Callable[[Any], Iterable[Any]] = dict.values
_grad, _dtype, _layout = attrgetter("grad"), attrgetter("dtype"), attrgetter("layout")


class Plan:
    """The batches of a step, and what they were made from.

    A kept plan holds aliases of parameters and state: what the user drops stays in memory until the next
    step. It holds no gradients.

    Args:
        batches: of the step being taken.
    """

    def __init__(self, batches: list[ParamBatch]) -> None:
        self.batches = batches
        self.stepped = [id(member.owner) for batch in batches for member in batch.members]
        self._members: list[ParamUpdate] = []

    def keep(self, groups: Sequence[Group], states: Mapping[Tensor, Any]) -> bool:
        """Prepare for the next step when this one is over; return False if all must be made anew then.

        Args:
            groups, states: all of the optimizer's.
        """
        if not self._members:
            if not (self.batches and all(map(_can_stay, self.batches))):
                return False
            self._record(groups, states)
        for member, row in zip(self._members, self._rows, strict=True):
            member.grad = member.columns[1] = _GONE
            if row.flats is not None:
                row.flats[1] = _GONE
                if row.pairs is not None:
                    row.pairs[1] = _GONE
        for batch in self.batches:
            if batch.config.measures:
                for member in batch.members:
                    member.scalars = {}
        return True

    def renew(self, groups: Sequence[Group], states: Mapping[Tensor, Any]) -> bool:
        """Give the members the present gradients, and return True; False if the plan does not hold."""
        grads = [*map(_grad, self._owners)]
        try:
            if not self._holds(grads, groups, states):
                return False
        except RuntimeError:
            # torch does not compare tensors on two devices; the model was moved.
            return False
        for member, row, grad in zip(self._members, self._rows, grads, strict=True):
            member.grad = member.columns[1] = grad
            if row.flats is not None:
                row.flats[1] = grad.view(row.flats[0].shape) if row.block or grad.dim() != 1 else grad
        return True

    def _holds(self, grads: Sequence[Any], groups: Sequence[Group], states: Mapping[Tensor, Any]) -> bool:
        """Return whether the batches are still right; this alone decides it.

        The groups' options, names and lists of parameters have been compared before, and the plan dropped if
        they differ: see :meth:`~steepest.engine.collect.Collector.check`.
        """
        # A property of all tensors is read without a Python loop, in a third of the time.
        objects = [*groups, *states, *states.values(), *chain.from_iterable(map(_values, self._states))]
        return (
            # Every parameter that had a gradient has one of the same kind, and no other has one.
            set(map(type, grads)) == {Tensor}
            and set(map(type, map(_grad, self._idle))) <= {type(None)}
            and [*map(_dtype, grads)] == self._dtypes
            and set(map(_layout, grads)) == {torch.strided}
            and [*map(Tensor.is_contiguous, grads)] == self._dense
            and not any(map(Tensor.is_neg, grads))
            # Groups and state are the same objects, under the same names.
            and len(objects) == len(self._objects)
            and all(map(is_, objects, self._objects))
            and [*map(tuple, self._states)] == self._names
            # Parameters and state are where they were: neither ``.data`` nor their shape was replaced.
            and all(map(Tensor.is_set_to, self._tensors, self._aliases))
        )

    def _record(self, groups: Sequence[Group], states: Mapping[Tensor, Any]) -> None:
        self._members = [member for batch in self.batches for member in batch.members]
        self._owners = [member.owner for member in self._members]
        grads = [member.grad for member in self._members]
        self._dtypes, self._dense = [*map(_dtype, grads)], [*map(Tensor.is_contiguous, grads)]
        known = {*self.stepped}
        self._idle = [p for group in groups for p in group["params"] if id(p) not in known]
        self._states = [member.state for member in self._members]
        self._objects = [*groups, *states, *states.values(), *chain.from_iterable(map(_values, self._states))]
        self._names = [*map(tuple, self._states)]
        self._tensors: list[Tensor] = []
        self._aliases: list[Tensor] = []
        self._rows: list[Row] = []
        for batch in self.batches:
            batch.rows = [self._row(member, batch.config.storage.block) for member in batch.members]
            self._rows += batch.rows

    def _row(self, member: ParamUpdate, block: int | None) -> Row:
        param, grad, *entries = member.columns
        # A view would refer to the parameter itself, which forbids torch.utils.swap_tensors().
        aliases = [tensor.detach() for tensor in (param, *entries)]
        self._tensors += param, *entries
        self._aliases += aliases
        row = Row(member.columns, {}, dtypes=tuple(map(_dtype, member.columns)), block=block)
        if all(map(Tensor.is_contiguous, (grad, *aliases))) and not any(map(Tensor.is_neg, aliases)):
            first, *others = flattened(aliases, block)
            row.flats = [first, _GONE, *others]
        return row


def _can_stay(batch: ParamBatch) -> bool:
    """Return whether a batch's members could be the next step's: whole, real, plain, and with their state."""
    config = batch.config
    if config.offloaded or config.rule.moves or config.home.type not in ("cpu", "cuda"):
        return False
    return all(map(_is_plain, batch.members))


def _is_plain(member: ParamUpdate) -> bool:
    if member.extent is not None or member.param is not member.owner or not member.columns:
        return False
    if type(member.state) is not dict:
        return False
    return member.grad is member.owner.grad and {*map(type, member.columns)} <= {*PLAIN}
