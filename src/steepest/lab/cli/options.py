"""The consoles and the options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ..errors import LabError
from ..progress import Callback, Several
from ..progress.live import Live
from ..progress.plain import Plain
from ..progress.tensorboard import TensorBoard
from ..tasks.load import load_task
from ..tasks.task import Task
from ..training.schedule import Schedule
from .workers import Workers, is_worker

INTERRUPTED = 130
BAD_REQUEST = 2

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_LOG_WIDTH = 120
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")

TaskOption = Annotated[
    str, typer.Option("--task", help="text, digits, images, sasrec, or your own: package.module:task.")
]
TaskSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="NAME=VALUE",
        help="An argument of the task, such as width=128. Repeatable.",
        show_default=False,
    ),
]
TextOption = Annotated[
    Path | None,
    typer.Option(
        "--text", help="Text task: a file or directory instead of Python's library.", show_default=False
    ),
]
OptimizersOption = Annotated[
    str,
    typer.Option(
        metavar="NAME,NAME,…",
        help="Names of steepest.list_optimizers(), or anybody's: torch.optim:AdamW, package.module:factory. "
        "label=NAME makes a variant.",
    ),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="OPTIMIZER.NAME=VALUE",
        help="A fixed hyper-parameter, such as muon.momentum=0.9. Repeatable.",
        show_default=False,
    ),
]
StepsOption = Annotated[
    int | None, typer.Option(help="Steps of every trial. Default: the task's.", show_default=False)
]
ScheduleOption = Annotated[str, typer.Option(metavar="cosine|linear|constant", help="Decay of the lr.")]
WarmupOption = Annotated[float, typer.Option(help="Fraction of the steps that warm up.")]
BaselineOption = Annotated[
    str | None, typer.Option(help="Whose final metric is the target. Default: adamw.", show_default=False)
]
DeviceOption = Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="Training device.")]
ThreadsOption = Annotated[int, typer.Option(help="CPU threads of each worker.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        help="Processes that share the trials. Default: one per CPU core; 1 on a GPU.", show_default=False
    ),
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Database that workers on several machines share, such as postgresql+psycopg://user@host/name. "
        "Default: a SQLite file in --out.",
        show_default=False,
    ),
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Delete the earlier experiment in --out.")]
TensorBoardOption = Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard runs.")]


def split_names(text: str) -> list[str]:
    """Return the names of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_task(name: str, settings: Sequence[str] | None, text: Path | None, device: str) -> Task[Any]:
    """Return the task that the options describe, or raise ``LabError``."""
    values = {}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise LabError(f"bad --with {setting!r}: write NAME=VALUE")
        values[key] = value
    if text is not None:
        if name != "text":
            raise LabError("--text requires --task text")
        values["path"] = str(text)
    return load_task(name, values, device=parse_device(device))


def parse_schedule(decay: str, warmup: float) -> Schedule:
    """Return the schedule, or raise ``LabError``."""
    if decay not in ("cosine", "linear", "constant") or not 0 <= warmup < 1:
        raise LabError(
            f"bad schedule {decay!r} with warm-up {warmup}: give cosine, linear or constant, and 0 ≤ warm-up < 1"
        )
    return Schedule(decay=decay, warmup=warmup)  # type: ignore[arg-type]


def make_callback(
    console: Console, arguments: Sequence[str], number: int = 1, tensorboard: Path | None = None
) -> Callback:
    """Return the display for this terminal, pipe or worker, which also starts the other workers."""
    if is_worker():
        return Callback()
    shown: Callback = Live(console) if console.is_terminal else Plain()
    return Several(Workers(arguments, number), shown, *([TensorBoard(tensorboard)] if tensorboard else []))


def make_console(width: int = _LOG_WIDTH) -> Console:
    """Return a console for the terminal, or of a fixed width for a pipe or file."""
    # A pipe has no width; rich would assume a narrow terminal and wrap the table's lines.
    console = Console(emoji=False)  # a name such as mine:factory: is none
    return console if console.is_terminal else Console(width=width, emoji=False)


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


def parse_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name, or raise ``LabError``."""
    if name not in DTYPES:
        raise LabError(f"no dtype {name!r}: give {', '.join(DTYPES)}")
    return DTYPES[name]
