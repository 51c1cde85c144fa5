"""`steepest report`: one page from the directories of experiments, finished or not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..printable import printable
from .finish import finish
from .options import make_console
from .paths import path_argument, path_option


def report_command(
    directories: Annotated[list[Path], path_argument("DIR…", "Directories of races, sweeps and studies.")],
    out: Annotated[
        Path | None,
        path_option("The page to write. Default: report.html in the first directory."),
    ] = None,
    markdown: Annotated[
        Path | None,
        path_option("Write this Markdown file too, with its pictures beside it."),
    ] = None,
) -> int:
    """Write one page about any experiments, finished or not, and print their rankings.

    Directories of the same experiment become one section, others sections of their own. An optimizer has
    the same colour in all of them. The page contains everything it needs and opens without a network.
    """
    finish(directories[0], directories, page=out)
    if markdown is not None:
        from ..report.markdown import write_markdown

        written = write_markdown(directories, markdown)
        make_console().print(f"markdown: {printable(str(written))}", highlight=False, soft_wrap=True)
    return 0
