"""Results as tables on a terminal."""

from __future__ import annotations

from rich.table import Table

from .results import Result, format_value

WIDE = 150
"""Minimum terminal width for the full table."""


def table(result: Result, width: int = WIDE) -> Table:
    """Build a rich table with the notes as its caption.

    Args:
        result: The result.
        width: Width of the terminal. Below `WIDE` the table omits its less important columns.
    """
    columns = [column for column in result.columns if width >= WIDE or not column.wide]
    notes = list(result.notes)
    if len(columns) < len(result.columns):
        notes.append(f"More columns in RESULTS.md, or in a terminal at least {WIDE} wide.")
    drawn = Table(
        title=result.title,
        caption="\n".join(notes),
        title_justify="left",
        caption_justify="left",
    )
    for number, column in enumerate(columns):
        drawn.add_column(
            column.header,
            justify="left" if column.kind == "text" else "right",
            style="bold" if number == 0 else None,
        )
    for row in result.rows:
        # Every group starts with its axpy row.
        if row.get("key") == "axpy" and drawn.row_count:
            drawn.add_section()
        drawn.add_row(*(format_value(row.get(column.key), column.kind) for column in columns))
    return drawn
