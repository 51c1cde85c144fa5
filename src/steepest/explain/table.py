"""Format an explanation as text: a table that fits the terminal, totals, notes and warnings."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence

from steepest.explain.rows import Row, Total
from steepest.views import View, is_transposed

__all__ = ["as_text", "starred"]

_NUMBER = re.compile(r"(?<![^.\s'])\d+(?=\.)|(?<=\.)\d+(?![^.\s'])")


def as_text(
    rows: Sequence[Row], totals: Sequence[Total], notes: Sequence[str], warnings: Sequence[str], width: int
) -> str:
    """Format the table with lines of at most ``width`` characters."""
    head = ("tensor", "shape", "rule", "lr", "decay", "view", "why")
    lines = _columns([head, *_merged(rows)], width)
    lines.append("")
    sums = [("total", "tensors", "parameters", "state", "frozen")]
    sums += [
        (t.rule, str(t.tensors), f"{t.parameters:,}", _bytes(t.state_bytes), str(t.frozen)) for t in totals
    ]
    sizes = [max(len(line[at]) for line in sums) for at in range(5)]
    for line in sums:
        cells = [line[0].ljust(sizes[0]), *(line[at].rjust(sizes[at]) for at in range(1, 5))]
        lines.append("  ".join(cells))
    for word, texts in (("note", notes), ("WARNING", warnings)):
        for text in texts:
            lines += textwrap.wrap(f"{word}: {text}", width, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(line.rstrip() for line in lines)


def starred(text: str) -> str:
    """Replace every number that is a whole part of a name by ``*``."""
    return _NUMBER.sub("*", text)


def _merged(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The cells of every line; rows whose names differ only in numbers share one line."""
    together: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cells = (
            starred(row.name),
            "×".join(map(str, row.shape)) or "scalar",
            row.rule,
            "" if math.isnan(row.lr) else f"{row.lr:.3g}",
            f"{row.weight_decay:.3g}",
            _words(row.view),
            starred(_reason(row)),
        )
        together.setdefault(cells, []).append(row)
    return [
        (f"{cells[0]} ({len(same)})", *cells[1:])
        if len(same) > 1
        else (same[0].name, *cells[1:6], _reason(same[0]))
        for cells, same in together.items()
    ]


def _reason(row: Row) -> str:
    """The reason, with a mark for frozen tensors."""
    return row.why + ("; frozen" if row.frozen else "")


def _words(view: View | str | None) -> str:
    """A view in words: ``"rows 3×8 transposed"``."""
    if view is None or isinstance(view, str):
        return view or ""
    kind, sizes = view[:2]
    words = [] if kind == "whole" else [kind]
    if len(sizes) > 1 and len(set(sizes)) == 1:
        words.append(f"{len(sizes)}×{sizes[0]}")
    elif sizes:
        words.append("+".join(map(str, sizes)))
    return " ".join(words + ["transposed"] * is_transposed(view))


def _columns(lines: list[tuple[str, ...]], width: int) -> list[str]:
    """Align the columns; wrap the first and the last if they are too wide."""
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
    """A number of bytes with its unit."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
