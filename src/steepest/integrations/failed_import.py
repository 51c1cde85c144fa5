"""Say what to install where a framework is missing, and why the import fails where it is there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec

__all__ = ["failed_import"]


def failed_import(module: str, requirements: Sequence[str], error: ImportError) -> ImportError:
    """Return the error to raise where a module could not import what it adapts to.

    Args:
        module: the module's name.
        requirements: what it imports, as pip takes them; each installs a package of its name.
        error: what the import raised.

    >>> print(failed_import("my.module", ["nowhere>=2.0"], ImportError("No module named 'nowhere'")))
    my.module needs nowhere: pip install 'nowhere>=2.0'
    """
    names = [re.split("[<>=]", each)[0] for each in requirements]
    if any(find_spec(name) is None for name in names):
        install = " ".join(each if each in names else f"'{each}'" for each in requirements)
        return ImportError(f"{module} needs {' and '.join(names)}: pip install {install}")
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    are = "is" if len(names) == 1 else "are"
    return ImportError(
        f"{module} needs {' and '.join(requirements)}, which {are} installed but cannot be imported: "
        f"{type(cause).__name__}: {cause}"
    )
