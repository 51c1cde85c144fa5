"""Benchmark results: rows of plain values under named columns, saved as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

SCHEMA = 1

Kind = Literal["text", "count", "ms", "seconds", "ratio", "percent", "bytes", "rate"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a table: the key in the rows, the header, and the number format (`kind`).

    A narrow terminal omits `wide` columns.
    """

    key: str
    header: str
    kind: Kind = "text"
    wide: bool = False


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


@dataclass
class Record:
    """A whole run: machine, settings and results."""

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    results: list[Result] = field(default_factory=list)
    interrupted: bool = False

    def save(self, path: Path) -> None:
        """Write the record as JSON, replacing an older file atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a record that `save` wrote.

        Raises:
            ValueError: another version wrote it.
        """
        read = json.loads(path.read_text(encoding="utf-8"))
        schema = read.pop("schema", None)
        if schema != SCHEMA:
            raise ValueError(f"{path}: schema {schema!r}, this version reads {SCHEMA}")
        results = [
            Result(**{**result, "columns": tuple(Column(**column) for column in result["columns"])})
            for result in read.pop("results")
        ]
        return cls(**read, results=results)


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
