"""What a benchmark finds: rows of plain values under named columns, kept as JSON."""

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
    """A key of the rows that the table shows, under a header, in a kind's way of writing numbers.

    A `wide` one is left out on a narrow terminal.
    """

    key: str
    header: str
    kind: Kind = "text"
    wide: bool = False


@dataclass(frozen=True)
class Result:
    """One table: what one section found, about one model if it is about one.

    Rows may hold more than the columns show; values are plain JSON.
    """

    section: str
    title: str
    columns: tuple[Column, ...]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


@dataclass
class Record:
    """A whole run: where, how, and what came of it."""

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    results: list[Result] = field(default_factory=list)
    interrupted: bool = False

    def save(self, path: Path) -> None:
        """Write it as JSON; an older file is replaced whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what `save` wrote.

        Raises:
            ValueError: it was written by another version.
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


def shown(value: Any, kind: Kind) -> str:
    """A value as the tables write it; what is not known is left blank.

    Example:
        >>> shown(0.034567, "ms"), shown(183.2, "ms"), shown(0.913, "percent"), shown(None, "ratio")
        ('0.0346', '183', '91 %', '')
        >>> shown(1536, "bytes"), shown(3 << 20, "bytes"), shown(0, "bytes"), shown(21500, "count")
        ('1.5 KiB', '3.0 MiB', '0 B', '21,500')
    """
    return "" if value is None else _WRITE[kind](value)


def _figures(value: float) -> str:
    """Three significant figures without an exponent."""
    if value == 0:
        return "0"
    size = abs(value)
    decimals = next((d for d, least in enumerate((100, 10, 1, 0.1, 0.01)) if size >= least), 5)
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
    """The result as a Markdown table, with its notes below."""
    headers = [column.header for column in result.columns]
    rules = ["---" if column.kind == "text" else "---:" for column in result.columns]
    lines = [f"## {result.title}", "", _line(headers), _line(rules)]
    lines += [_line([shown(row.get(c.key), c.kind) for c in result.columns]) for row in result.rows]
    if result.notes:
        lines += ["", *(f"- {note}" for note in result.notes)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
