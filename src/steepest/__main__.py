"""The `steepest` command: the versions, and the lab, if the packages that it needs are installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec

from steepest import __version__

_BAD_REQUEST = 2
_INTERRUPTED = 130
_EXTRA_PACKAGES = (
    "altair",
    "jinja2",
    "optuna",
    "pandas",
    "pydantic",
    "rich",
    "scipy",
    "sklearn",
    "typer",
    "vl_convert",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status: 0, 2 for a bad request, 130 when interrupted.

    `certify` exits with 1 if runs differ.

    Args:
        arguments: The command-line arguments without the program's name; by default `sys.argv[1:]`.
    """
    try:
        status = _run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:
        # From the first command on, the command line itself answers Ctrl-C.
        print("interrupted before the race started", file=sys.stderr)
        status = _INTERRUPTED
    raise SystemExit(status)


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        print(f"steepest {__version__}, torch {version('torch')}")
        return 0
    missing = [name for name in _EXTRA_PACKAGES if find_spec(name) is None]
    if missing:
        print(
            f'steepest: the lab needs {", ".join(missing)}: pip install "steepest[lab]"',
            file=sys.stderr,
        )
        return _BAD_REQUEST
    from steepest.lab.cli import run

    return run(arguments)


if __name__ == "__main__":
    main()
