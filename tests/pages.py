"""The pages of the documentation, and their blocks of code: tests take them from here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["PAGES", "ROOT", "blocks", "command_lines", "run_python"]

ROOT = Path(__file__).parents[1]
# Reports are written by the lab, and tested with it.
_FILES = [file for file in (ROOT / "docs").rglob("*.md") if file.parent.name != "evidence"]
PAGES = sorted(["README.md", "CONTRIBUTING.md", *(file.relative_to(ROOT).as_posix() for file in _FILES)])


def blocks(page: str, language: str = "python") -> list[str]:
    """Return the blocks of a language, such as ``python`` or ``sh``, in a page of the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def run_python(
    page: str, names: Mapping[str, Any] | None = None, *, shorter: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run all Python of a page from top to bottom, and return its names.

    Args:
        page: Its path in the repository.
        names: The names that the page takes for granted.
        shorter: What takes long -> what runs instead.
    """
    code, given = blocks(page), {"__name__": "page", **(names or {})}
    assert code, f"{page} has no Python"
    for long, short in (shorter or {}).items():
        assert any(long in block for block in code), f"{page} has no {long!r}"
        code = [block.replace(long, short) for block in code]
    for block in code:
        exec(compile(block, page, "exec"), given)
    return given


def command_lines(block: str) -> list[str]:
    """Return the commands of a block of shell, without comments."""
    lines = (re.sub(r"(^|\s)#.*", "", line) for line in block.replace("\\\n", " ").splitlines())
    return [" ".join(line.split()) for line in lines if line.strip()]
