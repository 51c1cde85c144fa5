"""The results as tables on a terminal."""

from __future__ import annotations

from rich.table import Table

from .results import Result, shown

WIDE = 150
"""Columns of a terminal from which on nothing is left out."""


def table(result: Result, width: int = WIDE) -> Table:
    """A rich table of the columns, the notes in its caption.

    Args:
        result: What to show.
        width: Columns of the terminal. Below `WIDE` the less important ones of the table's are left out.
    """
    columns = [column for column in result.columns if width >= WIDE or not column.wide]
    notes = list(result.notes)
    if len(columns) < len(result.columns):
        notes.append(f"More in RESULTS.md, or in a terminal {WIDE} columns wide.")
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
        # A new family begins with its axpy.
        if row.get("key") == "axpy" and drawn.row_count:
            drawn.add_section()
        drawn.add_row(*(shown(row.get(column.key), column.kind) for column in columns))
    return drawn
