"""Text of others, such as a label or a file's name, that a terminal, a page and an image can show."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator


def printable(text: str) -> str:
    """Write as Python escapes what would move a cursor, end a line, turn the text around, or has no glyph.

    Example:
        >>> print(printable("a\\x1b[31mb\\udcff"))
        a\\x1b[31mb\\udcff
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def without_password(text: str) -> str:
    """Leave out the password of each database's address: `://user:…@host`, or `?password=…`."""
    text = re.sub(r"(://[^:@/\s]*):[^@\s]*@", r"\1:…@", text)
    return re.sub(r"([?&]password=)[^&\s']*", r"\1…", text)


def _all(value: Any) -> Any:
    match value:
        case str():
            return printable(value)
        case Mapping():
            return {_all(key): _all(each) for key, each in value.items()}
        case list() | tuple():
            return type(value)(map(_all, value)) if type(value) in (list, tuple) else value
    return value


Printable = Annotated[str, BeforeValidator(_all)]
"""The type of a model's text."""
PrintableValues = Annotated[dict[str, Any], BeforeValidator(_all)]
"""The type of plain JSON values by name."""
