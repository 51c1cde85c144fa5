"""The consoles and the option values that several commands share."""

from __future__ import annotations

import re

import torch
from rich.console import Console

from ..bench.runner import DTYPES
from ..errors import LabError

INTERRUPTED = 130
BAD_REQUEST = 2

_LOG_WIDTH = 120
_WIDE = 180
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


def parse_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name, or raise ``LabError``."""
    if name not in DTYPES:
        raise LabError(f"no dtype {name!r}: give {', '.join(DTYPES)}")
    return DTYPES[name]


def split_names(text: str) -> list[str]:
    """Return the names of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def make_console() -> Console:
    """Return a console for the terminal, or of a fixed width for a pipe or file."""
    # A pipe has no width; rich would assume a narrow terminal and wrap the table's lines.
    console = Console()
    return console if console.is_terminal else Console(width=_LOG_WIDTH)


def make_wide_console() -> Console:
    """Return a console for wide tables; a terminal keeps its own width."""
    console = make_console()
    return console if console.is_terminal else Console(width=_WIDE)


def parse_device(name: str) -> torch.device:
    """Return the device of a name, or raise ``LabError`` if this machine has none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # mps is not supported, because the lab computes means in float64, which mps does not have.
    if not _DEVICE.fullmatch(name):
        raise LabError(f"no device {name!r}: give auto, cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LabError(f"no device {name!r} on this machine") from error
    return device
