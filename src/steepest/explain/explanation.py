"""Explain an optimizer's param groups: rows, totals, notes and warnings, as data and as a table."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from steepest.engine.units import Sharding
from steepest.explain.rows import UNNAMED, Reasons, Row, Total, make_rows, make_totals, starred
from steepest.explain.sharded import byte_words, describe_sharding, ranges
from steepest.explain.warnings import find_notes, find_warnings
from steepest.rule import Group, States, Targets
from steepest.views import View, is_transposed, repetitions

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """The rule and options of each tensor as plain data; ``str()`` makes a table that fits the terminal.

    In the table, tensors whose names differ only in numbers share one line, with ``*`` for the number: a
    pattern for ``steepest.build(..., overrides=..., views=...)``. So do those of a group without names.

    Attributes:
        rows: every tensor, in the order of the param groups.
        totals: per rule.
        notes: facts that are not mistakes: tied, frozen and left-out tensors, the work on sharded matrices.
        warnings: likely mistakes.
    """

    rows: tuple[Row, ...]
    totals: tuple[Total, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        return self.table(shutil.get_terminal_size((110, 24)).columns)

    def table(self, width: int = 110) -> str:
        """Format the table with lines of at most ``width`` characters, but never fewer than 80."""
        width = max(width, 80)
        lines = [*_columns(_cells(self.rows), width), ""]
        sums = [("total", "tensors", "parameters", "state", "frozen")]
        for total in self.totals:
            state = byte_words(total.state_bytes)
            sums.append((total.rule, str(total.tensors), f"{total.parameters:,}", state, str(total.frozen)))
        sizes = [max(map(len, column)) for column in zip(*sums, strict=True)]
        for rule, *counts in sums:
            lines.append("  ".join([rule.ljust(sizes[0]), *map(str.rjust, counts, sizes[1:])]))
        for word, texts in (("note", self.notes), ("WARNING", self.warnings)):
            for text in texts:
                lines += _wrap(f"{word}: {text}", width)
        return "\n".join(line.rstrip() for line in lines)


def explain(
    groups: Sequence[Group],
    main: str,
    reasons: Reasons | None,
    targets: Targets | None,
    sharding: Sharding | None = None,
    states: States | None = None,
) -> Explanation:
    """Explain param groups; ``main`` is the rule of the groups that name none."""
    reasons = reasons or Reasons()
    rows = make_rows(groups, reasons, targets, sharding, states)
    return Explanation(
        tuple(rows),
        make_totals(rows),
        (*find_notes(rows, main, reasons), *describe_sharding(sharding)),
        tuple(find_warnings(groups, rows, main, reasons)),
    )


def _cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return the cells of every line, header first; rows that differ only in numbers share one line."""
    sharded = any(row.layout is not None or row.owners for row in rows)
    masters = any(row.master is not None for row in rows)
    stored = masters or any("int8" in (row.state or "") for row in rows)
    shown = [*["state"] * stored, *["master"] * masters, *["layout"] * sharded]
    together: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        together.setdefault((_pattern(row.name), *_middle(row, shown), starred(_why(row))), []).append(row)
    head = ["tensor", "shape", "rule", "lr", "decay", "view", *shown, *["owner"] * sharded, "why"]
    lines = [tuple(head)]
    for shared, same in together.items():
        name, *middle, why = shared
        if len(same) == 1:
            name, why = same[0].name, _why(same[0])
        else:
            name = f"{_numbered(name, same)} ({len(same)})"
        owners = {owner for row in same for owner in row.owners}
        lines.append((name, *middle, *([ranges(owners)] if sharded else ()), why))
    return lines


def _pattern(name: str) -> str:
    """Return what a tensor's name has in common with those of its kind."""
    unnamed = UNNAMED.fullmatch(name)
    return starred(name) if unnamed is None else f"parameters of group {unnamed[2]}"


def _numbered(pattern: str, rows: Sequence[Row]) -> str:
    """Put the numbers of parameters without names into their pattern."""
    numbers = [int(unnamed[1]) for row in rows if (unnamed := UNNAMED.fullmatch(row.name))]
    if not numbers:
        return pattern
    runs = ranges(numbers).split(", ")
    shown = ", ".join([*runs[:3], *["…"] * (len(runs) > 3)])
    return pattern.replace("parameters", f"parameters {shown}", 1)


def _middle(row: Row, shown: Sequence[str]) -> tuple[str, ...]:
    optional = {"state": row.state or "", "master": row.master or "", "layout": row.layout or "whole"}
    return (
        "×".join(map(str, row.shape)) or "scalar",
        row.rule,
        "" if math.isnan(row.lr) else f"{row.lr:.3g}",
        f"{row.weight_decay:.3g}",
        _words(row.view),
        *(optional[name] for name in shown),
    )


def _why(row: Row) -> str:
    return row.why + ("; frozen" if row.frozen else "")


def _words(view: View | str | None) -> str:
    """Describe a view, as in ``"rows 3×8 transposed"``."""
    if view is None or isinstance(view, str):
        return view or ""
    kind, sizes = view[:2]
    words = [] if kind == "whole" else [kind]
    if len(sizes) > 1 and len(set(sizes)) == 1:
        words.append(f"{len(sizes)}×{sizes[0]}")
    elif sizes:
        words.append("+".join(map(str, sizes)))
    if repetitions(view) > 1:
        words.append(f"interleaved ×{repetitions(view)}")
    return " ".join(words + ["transposed"] * is_transposed(view))


def _columns(lines: list[tuple[str, ...]], width: int) -> list[str]:
    """Align the columns; wrap the first and the last if they are too wide."""
    *sizes, reason = [max(map(len, column)) for column in zip(*lines, strict=True)]
    gaps = 2 * len(sizes)
    reason = min(reason, max(24, width // 4))
    sizes[0] = max(12, min(sizes[0], width - sum(sizes[1:]) - gaps - reason))
    reason = max(12, width - sum(sizes) - gaps)
    made = []
    for name, *middle, why in lines:
        reasons = textwrap.wrap(why, reason, break_on_hyphens=False)
        for part, each in zip_longest(_wrap(name, sizes[0]), reasons, fillvalue=""):
            made.append("  ".join([*map(str.ljust, [part, *middle], sizes), each]))
            middle = [""] * len(middle)
    made.insert(1, "-" * min(width, sum(sizes) + gaps + reason))
    return made


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)
