"""`steepest certify`: does a training run resume bit for bit?"""

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
            metavar="MODULE:FUNCTION",
            help="A function without arguments that returns the make_model, make_optimizer, batches and loss "
            "of steepest.certify, as a tuple or a dict.",
        ),
    ],
    steps: Annotated[int, typer.Option(help="Number of training steps.")] = 10,
    stop_after: Annotated[
        int | None,
        typer.Option(help="Save after this many steps; 0 saves before the first. Default: half of --steps."),
    ] = None,
    via: Annotated[
        str, typer.Option(metavar="torch.save|dcp|dcp_flat", help="How to write the checkpoint.")
    ] = "torch.save",
    seed: Annotated[int, typer.Option(help="Seed of the uninterrupted run.")] = 0,
) -> int:
    """Certify that your training resumes bit for bit, as if it had never stopped.

    One run trains without a stop. Another is saved, and goes on in a new process. Parameters, buffers,
    optimizer state and options are compared after each step. The verdict names the first difference: the
    tensor, the size of the difference and its usual causes. The exit status is 0 if everything is identical,
    1 if not, and 2 if the training could not be run.
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
