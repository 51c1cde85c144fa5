"""The command line: one file per command, each a thin layer over the Python API."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ..errors import LabError
from ..printable import printable
from .bench import bench_command
from .certify import certify_command
from .options import BAD_REQUEST
from .plan import plan_command
from .plan_sharded import plan_sharded_command
from .profile import profile_command
from .race import race_command
from .report import report_command
from .study import study
from .sweep import sweep_command
from .workers import INTERRUPTED

app = typer.Typer(
    name="steepest",
    help="Memory-lean optimizers for PyTorch: find out which one suits your model.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

app.command("race")(race_command)
app.command("sweep")(sweep_command)
app.add_typer(study)
app.command("profile")(profile_command)
app.command("report")(report_command)
app.command("bench")(bench_command)
app.command("plan")(plan_command)
app.command("plan-sharded")(plan_sharded_command)
app.command("certify")(certify_command)


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status.

    A bad request prints one line on standard error and returns 2.
    """
    try:
        # The workers of a command run it with the same arguments.
        status = app(args=list(arguments), prog_name="steepest", standalone_mode=False, obj=list(arguments))
    except LabError as error:
        return _report_error(str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except Exception as error:
        # Typer's usage errors have this method. Typer would print them in a box; one line is enough.
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        return _report_error(format_message()) if format_message() else BAD_REQUEST
    if status == INTERRUPTED:
        # Also after a KeyboardInterrupt that typer has caught, of which it says nothing.
        print("interrupted", file=sys.stderr)
    return status if isinstance(status, int) else 0


def _report_error(text: str) -> int:
    print(f"steepest: error: {printable(' '.join(text.split()))}", file=sys.stderr)
    return BAD_REQUEST


@app.callback()
def _steepest(
    # For the help: steepest.__main__ answers it, which must not need typer.
    version: Annotated[bool, typer.Option("--version", help="Print the versions and exit.")] = False,
) -> None:
    """Memory-lean optimizers for PyTorch: find out which one suits your model."""
