"""Paths on the command line, which no script gives blank on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ..errors import LabError
from ..files import parse_path


def path_option(help: str) -> Any:
    """Return an option that takes a path."""
    return typer.Option(parser=_parse, metavar="PATH", help=help)


def path_argument(metavar: str, help: str) -> Any:
    """Return an argument that takes a path."""
    return typer.Argument(parser=_parse, metavar=metavar, help=help)


def _parse(text: str | Path) -> Path:
    try:
        return parse_path(text)
    except LabError as error:
        # Of any ValueError, typer shows the value alone.
        raise typer.BadParameter(str(error)) from error
