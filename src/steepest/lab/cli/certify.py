"""`steepest certify`: does a training resume to the bit?"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from ..errors import LabError
from .options import BAD_REQUEST

DIFFERS = 1


def certify_command(
    function: Annotated[
        str,
        typer.Argument(
            metavar="PACKAGE.MODULE:FUNCTION",
            help="A function without arguments that returns make_model, make_optimizer, batches and loss, as "
            "a tuple or a dict: see steepest.certify.",
        ),
    ],
    steps: Annotated[int, typer.Option(help="Steps of the training.")] = 10,
    stop_after: Annotated[
        int | None,
        typer.Option(help="Steps before the checkpoint; 0: before the first. Default: half."),
    ] = None,
    via: Annotated[
        str, typer.Option(metavar="torch.save|dcp|dcp_flat", help="How the checkpoint is written.")
    ] = "torch.save",
    seed: Annotated[int, typer.Option(help="Seed of the run that never stops.")] = 0,
) -> int:
    """Certify that your training resumes to the bit: save, new process, load, go on = never stopped.

    Compares parameters, buffers, optimizer state and options after each step. Prints the verdict: what
    differs first, in which tensor, by how much, and the usual causes. The status is 0 if everything is
    identical, 1 if not, and 2 if the training could not be run.
    """
    from steepest.trust import CertifyRequestError, certify_function

    # As `python -m` does, and a console script does not.
    sys.path.insert(0, str(Path.cwd()))
    try:
        certificate = certify_function(function, steps=steps, stop_after=stop_after, via=via, seed=seed)
    except CertifyRequestError as error:
        raise LabError(str(error)) from error
    except Exception:
        traceback.print_exc()
        return BAD_REQUEST
    finally:
        sys.path.remove(str(Path.cwd()))
    print(certificate)
    return 0 if certificate.identical else DIFFERS
