"""The user's own code: whatever `package.module:attribute` names."""

from __future__ import annotations

import importlib
import sys
from operator import attrgetter
from typing import Any

from .errors import LabError


def load(entry: str) -> Any:
    """Import `package.module:attribute`, also from the current directory, as `python -m` does.

    Raises:
        LabError: there is no such thing, or importing its module failed.

    Example:
        >>> load("pathlib:Path.home").__name__
        'home'
    """
    module, _, attribute = entry.partition(":")
    # The `steepest` script has its own folder on the path, not the current one.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return attrgetter(attribute)(importlib.import_module(module))
    # The module is the user's: importing it may raise anything.
    except Exception as error:
        raise LabError(f"cannot load {entry!r}: {type(error).__name__}: {error}") from error
