"""Tables: rows of plain values under named columns, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from steepest.lab.training.timing import Timing

Kind = Literal["text", "count", "ms", "seconds", "ratio", "percent", "bytes", "rate"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a table: the key in the rows, the header, and the number format (`kind`)."""

    key: str
    header: str
    kind: Kind = "text"


@dataclass(frozen=True)
class Result:
    """One table of one section.

    Rows may contain more keys than there are columns; all values are plain JSON.
    """

    section: str
    title: str
    columns: tuple[Column, ...]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def format_value(value: Any, kind: Kind) -> str:
    """Format a value for a table; None is blank.

    Example:
        >>> [format_value(value, "ms") for value in (0.034567, 183.2, None)]
        ['0.0346', '183', '']
        >>> [format_value(value, "bytes") for value in (1536, 3 << 20, 0)]
        ['1.5 KiB', '3.0 MiB', '0 B']
        >>> format_value(0.913, "percent"), format_value(21500, "count")
        ('91 %', '21,500')
    """
    return "" if value is None else _WRITE[kind](value)


def _figures(value: float) -> str:
    """Format with three significant figures and no exponent."""
    if value == 0:
        return "0"
    magnitude = abs(value)
    decimals = next((d for d, bound in enumerate((100, 10, 1, 0.1, 0.01)) if magnitude >= bound), 5)
    return f"{value:.{decimals}f}"


def _bytes(value: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value} B"


_WRITE: dict[Kind, Callable[[Any], str]] = {
    "text": str,
    "count": lambda value: f"{value:,}",
    "ms": _figures,
    "seconds": lambda value: f"{value:.1f}",
    "ratio": lambda value: f"{value:.2f}",
    "percent": lambda value: f"{value:.0%}".replace("%", " %"),
    "bytes": _bytes,
    "rate": _figures,
}


def markdown(result: Result) -> str:
    """Format the result as a Markdown table with its notes below."""
    headers = [column.header for column in result.columns]
    rules = ["---" if column.kind == "text" else "---:" for column in result.columns]
    lines = [f"## {result.title}", "", _line(headers), _line(rules)]
    lines += [_line([format_value(row.get(c.key), c.kind) for c in result.columns]) for row in result.rows]
    if result.notes:
        lines += ["", *(f"- {note}" for note in result.notes)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def timed(timing: Timing, name: str = "ms") -> Row:
    """Return the cells of a measured call: median, quartiles, rounds."""
    return {
        "status": "ok",
        "rounds": len(timing.ms),
        name: timing.median_ms,
        "quartiles_ms": timing.quartiles,
    }


def error_line(error: BaseException) -> str:
    """Format an error as one line that fits into a table."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text if len(text) <= 160 else text[:157] + '...'}"
