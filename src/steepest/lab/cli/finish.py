"""What a command does after its experiment: the ranking on the terminal, and the page."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..report.page import write_report
from ..report.terminal import terminal_table
from .workers import is_worker


def finish(directory: Path, console: Console) -> int:
    """Print the ranking and write `report.html`; return the exit status."""
    if not is_worker():
        console.print(terminal_table(directory, console.width))
        page = write_report([directory], directory / "report.html")
        console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return 0
