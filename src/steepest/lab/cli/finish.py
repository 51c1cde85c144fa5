"""What a command does after its experiment: the ranking on the terminal, and the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files import page_path
from ..printable import printable
from .options import make_console
from .workers import is_worker


def finish(
    directory: Path, parts: Sequence[Path] = (), *, tables: bool = True, page: Path | None = None
) -> int:
    """Print the rankings and write the page, unless this is a worker; return the exit status.

    `directory` is the experiment, or the folder for the report of `parts`. The page is by default its
    `report.html`.
    """
    if not is_worker():
        # Drawing imports pandas, SciPy and Altair, which no other part of a command needs.
        from ..report import load, section_table, write_report

        console, shown = make_console(), [*parts] or [directory]
        for section in load(shown) if tables else ():
            console.print(section_table(section, console.width))
        written = write_report(*shown, out=page or page_path(directory))
        console.print(f"report: {printable(str(written))}", highlight=False, soft_wrap=True)
    return 0
