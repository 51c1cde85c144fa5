"""Make the rows of the explanation from the param groups and build()'s reasons."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from steepest.engine.batches import name_of
from steepest.engine.layout import real_view
from steepest.engine.state import blank_state
from steepest.engine.units import Sharding
from steepest.explain.sharded import layout_words, owner_ranks
from steepest.explain.storage import master_words, state_words
from steepest.rule import Group, Rule, States, Targets, find_rule
from steepest.views import View, matrix_shapes

__all__ = ["BY_NAME", "UNNAMED", "Reasons", "Row", "Total", "make_rows", "make_totals", "starred"]

# The end of a reason that rests on a name alone; explain() warns about those.
BY_NAME = "by its name alone"

# The name of a row whose parameter has none: its number, and its group's.
UNNAMED = re.compile(r"parameter (\d+) of group (\d+)")
_NUMBER = re.compile(r"(?<![^.\s'])\d+(?=\.)|(?<=\.)\d+(?![^.\s'])")


@dataclass(frozen=True)
class Reasons:
    """Why :func:`steepest.build` routed each tensor as it did; stored on the optimizer, not in checkpoints.

    Attributes:
        why: parameter name -> ``"kind: reason"``.
        aliases: parameter name -> its other names, if it is tied or shared.
        left_out: frozen tensors that can never train and are in no group, with their dtypes.
        guesses: notes about output layers that build() guessed, with little doubt.
        ambiguities: warnings about output layers that build() had to guess.
        fallback: the name of the rule for the tensors that the main rule does not take.
        known_views: names of the parameters whose view build() found by itself.
        own_layouts: names of the weights in classes of other packages, which lay out fused matrices in
            ways of their own.
    """

    why: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    guesses: tuple[str, ...] = ()
    ambiguities: tuple[str, ...] = ()
    fallback: str | None = None
    known_views: Collection[str] = ()
    own_layouts: Collection[str] = ()


@dataclass(frozen=True)
class Row:
    """One tensor.

    Attributes:
        name: the parameter's name, or its position if it has none.
        aliases: its other names, if it is tied or shared.
        shape: its shape.
        rule: the rule's name.
        lr: the group's current learning rate; NaN if it has none.
        weight_decay: the group's current weight decay; 0 if the rule has none.
        view: how a matrix rule sees it: a view, ``"batch"``, ``"flatten"``, ``"merge"`` (the most square
            matrix, PSGD's), or None.
        why: the kind of tensor and the reason, as ``"kind: reason"``; for a tensor that
            :func:`steepest.build` did not route ``"one rule for all tensors"`` or ``"set by hand"``.
        frozen: whether it requires no gradient.
        parameters: number of elements.
        state_bytes: bytes of its state once it has been stepped; 0 while it is frozen.
        layout: how a mesh's processes hold it, as in ``"Shard(0) of 8"``; None for a plain tensor.
        owners: the ranks that compute its matrices, in this process's team; empty if every process computes
            what it needs.
        state: how its averages are stored: ``"float32"``, or ``"int8/64"`` for a byte each and one scale for
            64; None where it has none.
        master: the format of its master weight; None where none is kept.
        way: how its matrices are computed, as in ``"gram bfloat16 turned"``, where that is chosen by timing
            (:func:`steepest.autotune`); the default until the first step.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    rule: str
    lr: float
    weight_decay: float
    view: View | str | None
    why: str
    frozen: bool
    parameters: int
    state_bytes: int
    layout: str | None = None
    owners: tuple[int, ...] = ()
    state: str | None = None
    master: str | None = None
    way: str | None = None

    @property
    def kind(self) -> str:
        """The part of ``why`` before the colon."""
        return self.why.partition(":")[0]


@dataclass(frozen=True)
class Total:
    """A rule's sums: tensors, elements, bytes of state, and how many of the tensors are frozen."""

    rule: str
    tensors: int
    parameters: int
    state_bytes: int
    frozen: int


def make_rows(
    groups: Sequence[Group],
    reasons: Reasons,
    targets: Targets | None,
    sharding: Sharding | None = None,
    states: States | None = None,
) -> list[Row]:
    """Make the rows of all parameters, or of their targets, in the order of the groups."""
    # Each reason is used once: a group that was added later may repeat a name.
    why, aliases = dict(reasons.why), dict(reasons.aliases)
    one_rule = not why and len({group["rule"] for group in groups}) == 1
    otherwise = "one rule for all tensors" if one_rule else "set by hand"
    rows = []
    for group_index, group in enumerate(groups):
        rule = find_rule(group["rule"])
        for index, param in enumerate(group["params"]):
            label: Any = name_of(group, index)
            target = None if targets is None else targets.find(param)
            own = {} if states is None else states.get(param, {})
            stored = {name: each.dtype for name, each in own.items() if isinstance(each, Tensor)}
            state: dict[str, Tensor] = {}
            if param.requires_grad:
                blank = blank_state(real_view(param), group, label, target, stored)
                state = {name: entry for name, (_, entry) in blank.items()}
            row = Row(
                name=f"parameter {index} of group {group_index}" if label is None else label,
                aliases=tuple(aliases.pop(label, ())),
                shape=tuple(param.shape),
                rule=rule.name,
                lr=float(group["lr"]),
                weight_decay=float(group.get("weight_decay", 0.0)),
                view=_view(rule, param, label, group),
                why=why.pop(label, otherwise),
                frozen=not param.requires_grad,
                parameters=param.numel(),
                state_bytes=sum(value.nbytes for value in state.values()),
                layout=layout_words(param),
                owners=() if sharding is None else owner_ranks(sharding.of(param) or ()),
                state=state_words(rule, group, param, label, state),
                master=master_words(state),
                way=_way(rule, param, label, group) if rule.transforms and param.requires_grad else None,
            )
            if targets is not None and target is not None:
                row = replace(row, **targets.describe(param, group))
            rows.append(row)
    return rows


def make_totals(rows: Sequence[Row]) -> tuple[Total, ...]:
    """Sum up the rows of every rule, in the order in which the rules appear."""
    totals = []
    for rule in dict.fromkeys(row.rule for row in rows):
        own = [row for row in rows if row.rule == rule]
        parameters, state = sum(row.parameters for row in own), sum(row.state_bytes for row in own)
        totals.append(Total(rule, len(own), parameters, state, sum(row.frozen for row in own)))
    return tuple(totals)


def starred(text: str) -> str:
    """Replace every number that is a whole part of a name by ``*``."""
    return _NUMBER.sub("*", text)


def _view(rule: Rule, param: Tensor, label: str | None, group: Group) -> View | str | None:
    """Return how the rule sees the parameter; None for a plain matrix or a rule that sees no matrices."""
    if "views" not in rule.hyper:
        return None
    arranged = group.get("view", "merge") if param.dim() > 2 else None
    return (group.get("views") or {}).get(label) or arranged


def _way(rule: Rule, param: Tensor, label: str | None, group: Group) -> str | None:
    """Return how the rule computes the parameter's matrices, or the first of its blocks."""
    view = None if label is None else (group.get("views") or {}).get(label)
    shape = param.shape
    if view is not None:
        shape = matrix_shapes(shape, view, rule.counts_matrices(group))[0]
    return rule.way(rule.matrix_shape(shape, group), param.dtype, param.device, group)
