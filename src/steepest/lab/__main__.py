"""The `steepest` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

_EXTRA = ("typer", "rich", "matplotlib", "jinja2", "sklearn")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status: 0, 2 for a bad request, 130 when interrupted.

    Args:
        arguments: What follows the program's name; by default the process's own.
    """
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        print(
            f'steepest: the lab needs {", ".join(missing)}: pip install "steepest[lab]"',
            file=sys.stderr,
        )
        raise SystemExit(2)
    from .cli import run

    raise SystemExit(run(sys.argv[1:] if arguments is None else list(arguments)))


if __name__ == "__main__":
    main()
