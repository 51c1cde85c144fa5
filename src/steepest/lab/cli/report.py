"""`steepest report`: one page about several experiments, finished or not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..printable import printable
from .finish import finish
from .options import make_console
from .paths import path_argument, path_option


def report_command(
    directories: Annotated[
        list[Path], path_argument("DIR…", "Output directories of races, sweeps or studies.")
    ],
    out: Annotated[
        Path | None,
        path_option("The page to write. Default: report.html in the first directory."),
    ] = None,
    markdown: Annotated[
        Path | None,
        path_option("Also write this Markdown file, with its pictures beside it."),
    ] = None,
) -> int:
    """Write one report on any number of experiments, finished or not, and print their rankings.

    Directories that hold parts of the same experiment share a section; every other experiment gets its own.
    An optimizer has the same color in all of them. The page is self-contained and opens offline.
    """
    finish(directories[0], directories, page=out)
    if markdown is not None:
        from ..report.markdown import write_markdown

        written = write_markdown(directories, markdown)
        make_console().print(f"markdown: {printable(str(written))}", highlight=False, soft_wrap=True)
    return 0
