"""The ranking as a table on the terminal."""

from __future__ import annotations

from textwrap import wrap

from rich import box
from rich.table import Table
from rich.text import Text

from .merge import Section
from .table import LEGEND, columns


def section_table(section: Section, width: int = 100) -> Table:
    """Return the table of a section; less important columns are left out if it would be too wide."""
    rows, shown = section.rows, columns(section)
    headers = {id(column): wrap(column.header, 11, break_long_words=False) for column in shown}
    names = [*(row.optimizer for row in rows), *section.experiment.not_run]
    # The seeds that diverged, in parentheses, may have a line of their own.
    sizes = {
        id(c): max(map(len, [*headers[id(c)], *(cell.split(" (")[0] for cell in c.cells)])) + 2 for c in shown
    }
    first = min(24, max(map(len, [*names, "optimizer"])))
    while len(shown) > 1 and first + 2 + sum(sizes[id(c)] for c in shown) > width:
        shown.remove(max(reversed(shown), key=lambda column: column.rank))
    table = Table(
        title=Text(section.experiment.title), title_justify="left", caption_justify="left",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, min_width=min(width, 80),
        caption=Text("\n".join([LEGEND, *section.warnings])),
    )  # fmt: skip
    table.add_column("optimizer", max_width=24, overflow="fold")
    for column in shown:
        table.add_column("\n".join(headers[id(column)]), justify="right", max_width=sizes[id(column)])
    for index, row in enumerate(rows):
        style = "bold" if row.wins else ""
        table.add_row(Text(row.optimizer), *(Text(column.cells[index]) for column in shown), style=style)
    for name in section.experiment.not_run:
        table.add_row(Text(name), Text("not run"), style="dim")
    return table
