"""The results as tables on a terminal."""

from __future__ import annotations

from rich.table import Table

from .results import Result, shown


def table(result: Result) -> Table:
    """A rich table of the columns, the notes in its caption."""
    drawn = Table(
        title=result.title,
        caption="\n".join(result.notes),
        title_justify="left",
        caption_justify="left",
    )
    for number, column in enumerate(result.columns):
        drawn.add_column(
            column.header,
            justify="left" if column.kind == "text" else "right",
            style="bold" if number == 0 else None,
        )
    for row in result.rows:
        # A new family begins with its axpy.
        if row.get("key") == "axpy" and drawn.row_count:
            drawn.add_section()
        drawn.add_row(*(shown(row.get(column.key), column.kind) for column in result.columns))
    return drawn
