"""What a command does after its experiment: the ranking on the terminal, and the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..report.page import write_report
from ..report.terminal import terminal_table
from .workers import is_worker


def finish(directory: Path, console: Console, parts: Sequence[Path] = ()) -> int:
    """Print the ranking and write `report.html`; return the exit status.

    Args:
        directory: The experiment, or the folder for the report of `parts`.
        console: Where the rankings are printed.
        parts: The experiments, if there are several.
    """
    if not is_worker():
        for part in parts or [directory]:
            console.print(terminal_table(part, console.width))
        page = write_report([*parts] or [directory], directory / "report.html")
        console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return 0
