"""The results of an experiment from Python: its ranking, and its page."""

from __future__ import annotations

from pathlib import Path

from ..analysis.ranking import Row
from . import page
from .merge import load


def ranking(directory: str | Path) -> list[Row]:
    """Return a row for every optimizer of the experiment in `directory`, finished or not, best first.

    Raises:
        LabError: the directory holds no experiment.
    """
    return load([Path(directory)])[0].rows


def write_report(*directories: str | Path, out: str | Path | None = None) -> Path:
    """Write one page about the experiments in `directories`, finished or not, and return its path.

    Args:
        directories: The experiments' directories.
        out: The page's path, by default `report.html` in the first directory.

    Raises:
        LabError: there is no directory, or one holds no experiment.
    """
    paths = [Path(directory) for directory in directories]
    chosen = paths[0] / "report.html" if out is None and paths else Path(out or "report.html")
    return page.write_report(paths, chosen)
