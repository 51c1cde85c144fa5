"""The files that the lab reads and writes: whole or not at all, and one line for the user if that fails."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from .errors import LabError


def parse_path(text: str | Path) -> Path:
    """Return a path, or raise ``LabError`` for a blank one, which would mean the current directory."""
    if not str(text).strip():
        raise LabError(f"the path {str(text)!r} is blank: is a variable not set? The current directory is .")
    return Path(text)


def page_path(directory: str | Path) -> Path:
    """Return where a directory's report goes, or raise ``LabError`` if it would replace what is no report."""
    page = Path(directory, "report.html")
    # Path's own is_file() and exists() raise an error for a name that is too long.
    if os.path.isfile(directory):  # noqa: PTH113
        raise LabError(f"{directory} is a file: choose another directory")
    if os.path.exists(page) and b"Written by steepest" not in read_file(page):  # noqa: PTH110
        raise LabError(f"{page} was not written by steepest: move it away, or choose another directory")
    return page


def read_file(path: Path) -> bytes:
    """Return the content of a file that exists, or raise ``LabError``."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise LabError(f"cannot read {path}: {error.strerror or error}; move it away") from error


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file so that whoever reads it finds the old content or the new, or raise ``LabError``."""
    # Several workers may write at once.
    draft = path.with_suffix(f".{os.getpid()}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room, and run the command again" if full else "move what is there, or write elsewhere"
        raise LabError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


def remove_file(path: Path) -> None:
    """Delete a file if there is one, or raise ``LabError``."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise LabError(f"cannot delete {path}: {error.strerror or error}; move it away") from error
