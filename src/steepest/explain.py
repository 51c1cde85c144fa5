"""What every tensor of an optimizer gets, and why: a table, its totals, and what looks wrong in it."""

from __future__ import annotations

import math
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steepest.engine.collect import describe
from steepest.engine.layout import real_view
from steepest.engine.state import blank_state
from steepest.rule import find_rule
from steepest.views import View

__all__ = [
    "ALIASES",
    "BY_NAME",
    "DOUBTS",
    "FALLBACK",
    "LEFT_OUT",
    "WHY",
    "Explanation",
    "Row",
    "Total",
    "explain",
]

# The keys of a param group that say why, as plain data: a list aligned with "params" each, but for
# LEFT_OUT, a list of names, DOUBTS, a list of warnings, and FALLBACK, a rule's name.
WHY, ALIASES, LEFT_OUT, DOUBTS, FALLBACK = "why", "aliases", "left_out", "doubts", "fallback"

# The end of a reason that nothing but a name supports: it is warned of.
BY_NAME = "by its name alone"

_GIVEN = "given: nobody said why"
_NUMBER = re.compile(r"(?<![^.\s'])\d+(?=\.)|(?<=\.)\d+(?![^.\s'])")
_QKV = re.compile(r"qkv|query_key_value|c_attn|in_proj", re.IGNORECASE)
_GATE_UP = re.compile(r"gate_up|gate_and_up|w1_?w?3|w1_?w?2$", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One tensor.

    Attributes:
        name: the parameter's name, or its place if it has none.
        aliases: its other names, where it is tied or shared.
        shape: its shape.
        rule: the rule's name.
        lr: the group's learning rate now; NaN for what has none.
        weight_decay: the group's weight decay now; 0 for a rule without.
        view: how a rule that sees matrices sees it: blocks, ``"batch"``, ``"flatten"``, ``"merge"`` (the
            most square matrix, PSGD's), or None.
        why: the kind of tensor and the reason, as ``"kind: reason"``.
        frozen: whether it requires no gradient.
        parameters: number of elements.
        state_bytes: of its state once it has been stepped; 0 while it is frozen.
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

    @property
    def kind(self) -> str:
        """The first word of ``why``."""
        return self.why.partition(":")[0]


@dataclass(frozen=True)
class Total:
    """The sums of a rule: tensors, their elements, bytes of state; frozen ones counted apart."""

    rule: str
    tensors: int
    parameters: int
    state_bytes: int
    frozen: int


@dataclass(frozen=True)
class Explanation:
    """What every tensor gets: plain data, and as a string a table that fits the terminal.

    In the table, tensors that differ in nothing but numbers in their names are one line, with ``*`` for
    the number: that is a glob, as ``steepest.build(..., overrides=..., views=...)`` take them.

    Attributes:
        rows: every tensor, in the order of the param groups.
        totals: per rule.
        notes: what is not in the rows and is as it should be: tied, frozen and left-out tensors.
        warnings: what is probably not meant.
    """

    rows: tuple[Row, ...]
    totals: tuple[Total, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        return self.table(shutil.get_terminal_size((110, 24)).columns)

    def table(self, width: int = 110) -> str:
        """The table with lines of at most ``width`` characters, or 80 if that is more."""
        width = max(width, 80)
        head = ("tensor", "shape", "rule", "lr", "decay", "view", "why")
        lines = _columns([head, *_merged(self.rows)], width)
        lines.append("")
        totals = [("total", "tensors", "parameters", "state", "frozen")]
        totals += [
            (t.rule, str(t.tensors), f"{t.parameters:,}", _bytes(t.state_bytes), str(t.frozen))
            for t in self.totals
        ]
        sizes = [max(len(line[at]) for line in totals) for at in range(5)]
        for line in totals:
            cells = [line[0].ljust(sizes[0]), *(line[at].rjust(sizes[at]) for at in range(1, 5))]
            lines.append("  ".join(cells))
        for word, texts in (("note", self.notes), ("WARNING", self.warnings)):
            for text in texts:
                lines += textwrap.wrap(
                    f"{word}: {text}",
                    width,
                    subsequent_indent="  ",
                    break_on_hyphens=False,
                )
        return "\n".join(line.rstrip() for line in lines)


def explain(groups: Sequence[Mapping[str, Any]], main: str, others: Sequence[Row] = ()) -> Explanation:
    """Explain an optimizer's param groups.

    Args:
        groups: the param groups, with the rule's options filled in.
        main: the name of the rule of the groups that name none.
        others: what trains and is no parameter.
    """
    given = [_row(group, at, index) for at, group in enumerate(groups) for index in range(_count(group))]
    rows = (*given, *others)
    names = list(dict.fromkeys(row.rule for row in rows))
    return Explanation(
        rows,
        tuple(_total(name, [row for row in rows if row.rule == name]) for name in names),
        tuple(_notes(groups, given, main)),
        tuple(_warnings(groups, given, main)),
    )


def _count(group: Mapping[str, Any]) -> int:
    return len(group["params"])


def _row(group: Mapping[str, Any], group_index: int, index: int) -> Row:
    param = group["params"][index]
    label = group["param_names"][index] if "param_names" in group else None
    aliases = group.get(ALIASES, [])
    why = group.get(WHY, [])
    return Row(
        name=label if label is not None else describe(group, group_index, index),
        aliases=tuple(aliases[index]) if index < len(aliases) else (),
        shape=tuple(param.shape),
        rule=group["rule"],
        lr=float(group["lr"]),
        weight_decay=float(group.get("weight_decay", 0.0)),
        view=_view(group, label, param),
        why=why[index] if index < len(why) else _GIVEN,
        frozen=not param.requires_grad,
        parameters=param.numel(),
        state_bytes=_state_bytes(group, index, label) if param.requires_grad else 0,
    )


def _view(group: Mapping[str, Any], label: str | None, param: Tensor) -> View | str | None:
    rule = find_rule(group["rule"])
    if not rule.transforms:
        return None
    view: View | None = (group.get("views") or {}).get(label)
    if view is not None:
        return view
    return group.get("view", "merge") if param.dim() > 2 else None


def _state_bytes(group: Mapping[str, Any], index: int, label: str | None) -> int:
    """Bytes of the state that the first step makes."""
    state = blank_state(real_view(group["params"][index]), group, label)
    return sum(value.numel() * value.element_size() for value in state.values())


def _total(rule: str, rows: list[Row]) -> Total:
    return Total(
        rule,
        len(rows),
        sum(row.parameters for row in rows),
        sum(row.state_bytes for row in rows),
        sum(row.frozen for row in rows),
    )


def _notes(groups: Sequence[Mapping[str, Any]], rows: Sequence[Row], main: str) -> list[str]:
    notes = [
        f"{row.name} is also {', '.join(row.aliases)}: stepped once, under its first name"
        for row in rows
        if row.aliases
    ]
    frozen = [row for row in rows if row.frozen]
    if frozen:
        notes.append(
            f"{len(frozen)} frozen tensors ({sum(row.parameters for row in frozen):,} parameters) are not "
            "stepped and have no state; one that is thawed trains on with the rule shown"
        )
    left_out = [name for group in groups for name in group.get(LEFT_OUT, [])]
    if left_out:
        shown = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        notes.append(f"{len(left_out)} frozen tensors are left out, since they can never train: {shown}")
    fallback = {group[FALLBACK] for group in groups if FALLBACK in group}
    if fallback and not find_rule(main).hidden_only:
        name = sorted(fallback)[0]
        if name != main:
            notes.append(f"the fallback {name!r} is not used: {main!r} takes every tensor")
    if any(row.weight_decay == 0 and row.kind in ("norm", "bias", "gain") for row in rows) and any(
        row.weight_decay > 0 for row in rows
    ):
        notes.append("norms, biases and gains are not decayed; decay_vectors=True decays them")
    return notes


def _warnings(groups: Sequence[Mapping[str, Any]], rows: Sequence[Row], main: str) -> list[str]:
    """What is probably not meant, tensors that differ only in numbers named once."""
    warnings = []
    training = [row for row in rows if not row.frozen]
    if training and find_rule(main).hidden_only and not any(row.rule == main for row in training):
        warnings.append(
            f"nothing goes to {main!r}: no trainable tensor is a matrix of a hidden layer. "
            "overrides={...: " + repr(main) + "} gives it some"
        )
    told = {name for group in groups for name in (group.get("views") or {})}
    warnings += dict.fromkeys(doubt for group in groups for doubt in group.get(DOUBTS, []))
    said: dict[str, str] = {}
    for row in training:
        name = _starred(row.name)
        guessed = row.why.endswith(BY_NAME) and row.kind != "override"
        if (row.kind == "unknown" or guessed) and find_rule(main).hidden_only:
            taken = (
                f"is taken for a {row.kind}, {BY_NAME}"
                if guessed
                else "belongs to a module that is not known"
            )
            asks, answer = "it is the matrix of a hidden layer", repr(main)
            if len(row.shape) > 2:
                asks = "its leading dimension counts matrices"
                answer = f"{{'rule': {main!r}, 'view': 'batch'}}"
            said[name] = (
                f"{name} {row.shape} {taken}, and goes to {row.rule!r}. "
                f"If {asks}: overrides={{{name!r}: {answer}}}"
            )
        if not find_rule(row.rule).hidden_only:
            continue
        if sum(size > 1 for size in row.shape) <= 1:
            said[name] = (
                f"{name} {row.shape} is a vector in a matrix's shape, and {row.rule!r} takes matrices"
            )
        elif len(row.shape) == 2 and row.view is None and row.name not in told:
            fused = _looks_fused(name, row.shape)
            if fused is not None:
                said[name] = f"{name} {row.shape} {fused}"
    return warnings + list(said.values())


def _looks_fused(name: str, shape: tuple[int, ...]) -> str | None:
    """What to say of a matrix that may be several."""
    out, into = shape
    asks = "may be query, key and value in one. If it is: views={" + repr(name) + ": "
    whole = "}; if it is one matrix, None there says so"
    called = _QKV.search(name) is not None
    if out == 3 * into:
        return f"{asks}rows({into}, {into}, {into}){whole}"
    if called and into == 3 * out:
        return f"{asks}columns({out}, {out}, {out}){whole}"
    if called:
        return f"{asks}rows(...)" + whole
    if _GATE_UP.search(name) and out % 2 == 0:
        return (
            "may be two projections in one. If it is: views={"
            + f"{name!r}: rows({out // 2}, {out // 2}){whole}"
        )
    return None


def _starred(text: str) -> str:
    """The text with ``*`` for every number that is a whole part of a name."""
    return _NUMBER.sub("*", text)


def _merged(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The cells of every line of the table: rows that differ only in numbers in their names together."""
    together: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cells = (
            _starred(row.name),
            "×".join(map(str, row.shape)) or "scalar",
            row.rule,
            "" if math.isnan(row.lr) else f"{row.lr:.3g}",
            f"{row.weight_decay:.3g}",
            _words(row.view),
            _starred(_reason(row)),
        )
        together.setdefault(cells, []).append(row)
    return [
        (f"{cells[0]} ({len(same)})", *cells[1:])
        if len(same) > 1
        else (same[0].name, *cells[1:6], _reason(same[0]))
        for cells, same in together.items()
    ]


def _reason(row: Row) -> str:
    return row.why + ("; frozen" if row.frozen else "")


def _words(view: View | str | None) -> str:
    if view is None or isinstance(view, str):
        return view or ""
    kind, sizes = view
    if len(sizes) > 1 and len(set(sizes)) == 1:
        return f"{kind} {len(sizes)}×{sizes[0]}"
    return f"{kind} {'+'.join(map(str, sizes))}"


def _columns(lines: list[tuple[str, ...]], width: int) -> list[str]:
    """Aligned columns; the first and the last are wrapped where they are too wide."""
    sizes = [max(len(line[at]) for line in lines) for at in range(6)]
    reason = min(max(len(line[6]) for line in lines), max(24, width // 4))
    sizes[0] = max(12, min(sizes[0], width - sum(sizes[1:]) - 2 * 6 - reason))
    reason = max(12, width - sum(sizes) - 2 * 6)
    made = []
    for at, line in enumerate(lines):
        middle = [cell.ljust(size) for cell, size in zip(line[1:6], sizes[1:], strict=True)]
        names = textwrap.wrap(line[0], sizes[0], subsequent_indent="  ", break_on_hyphens=False)
        reasons = textwrap.wrap(line[6], reason, break_on_hyphens=False)
        for number in range(max(len(names), len(reasons))):
            name = names[number] if number < len(names) else ""
            why = reasons[number] if number < len(reasons) else ""
            between = middle if number == 0 else [" " * size for size in sizes[1:]]
            made.append("  ".join([name.ljust(sizes[0]), *between, why]))
        if at == 0:
            made.append("-" * min(width, sum(sizes) + 12 + reason))
    return made


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
