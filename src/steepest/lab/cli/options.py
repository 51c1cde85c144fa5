"""Consoles, and the options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from steepest.model_shapes import MODELS

from ..defaults import DTYPES, TASKS
from ..errors import LabError
from ..files import page_path
from .completion import complete_optimizers
from .paths import path_option
from .workers import Workers, count_workers, end_with_parent, is_worker

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..tasks.task import Task

BAD_REQUEST = 2

_LOG_WIDTH = 120
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")

TaskOption = Annotated[
    str,
    typer.Option(
        "--task",
        metavar="TASK",
        help=f"What to train: {', '.join(TASKS)}, or your own as package.module:task.",
        autocompletion=lambda: [*TASKS],
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "--shapes",
        metavar="MODEL",
        help=f"The model: {', '.join(MODELS)}; your own as MODULE:FUNCTION, where the function returns it, "
        "on the meta device if that works, where weights take no memory; or a file of names and shapes, as "
        "JSON ({name: [rows, columns]}) or CSV (name,ROWSxCOLUMNS).",
        autocompletion=lambda: [*MODELS],
    ),
]
OptimizersOption = Annotated[
    str,
    typer.Option(
        metavar="NAME,NAME,…",
        help="Optimizers to compare: steepest's by name, any other by its import path, such as "
        "torch.optim:AdamW. LABEL=NAME adds a variant, for --set.",
        autocompletion=complete_optimizers,
    ),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="OPTIMIZER.NAME=VALUE",
        help="Fix a hyper-parameter, such as muon.momentum=0.9. Repeatable.",
    ),
]
SeedsOption = Annotated[
    int, typer.Option("--seeds", help="Number of final seeds; the search uses none of them.")
]
StepsOption = Annotated[int | None, typer.Option(help="Training steps per trial. Default: the task's own.")]
DeviceOption = Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="Device to run on.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(DTYPES),
        help="Dtype of the parameters. Default: float32, or the dtype of your model.",
    ),
]


@dataclass(frozen=True)
class TaskOptions:
    """What is trained."""

    task: TaskOption = "text"
    task_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--with", metavar="NAME=VALUE", help="Set an argument of the task, such as width=128. Repeatable."
        ),
    ] = None
    text: Annotated[
        Path | None,
        path_option(
            "For the text task: train on this file or directory. Default: Python's standard library."
        ),
    ] = None

    @property
    def folder(self) -> str:
        """The task's name as a part of a directory's."""
        return self.task.replace(":", "-")

    def load(self, device: str) -> Task[Any]:
        """Return the task, or raise ``LabError``."""
        from ..tasks.load import load_task

        values = {}
        for setting in self.task_settings or ():
            key, equals, value = setting.partition("=")
            if not equals:
                raise LabError(f"bad --with {setting!r}: write NAME=VALUE")
            values[key] = value
        if self.text is not None:
            if self.task != "text":
                raise LabError("--text requires --task text")
            values["path"] = str(self.text)
        return load_task(self.task, values, device=parse_device(device))


@dataclass(frozen=True)
class TrainingOptions:
    """How a race or sweep trains its models."""

    settings: SettingsOption = None
    seeds: SeedsOption = 3
    steps: StepsOption = None
    baseline: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Optimizer that the others have to match. Default: adamw."),
    ] = None
    schedule: Annotated[
        Literal["cosine", "linear", "constant"], typer.Option(help="Learning-rate decay after warm-up.")
    ] = "cosine"
    warmup: Annotated[
        float, typer.Option(min=0, max=1, help="Fraction of the steps used for linear warm-up.")
    ] = 0.1
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log to TensorBoard.")] = False

    def arguments(self) -> dict[str, Any]:
        """Return the arguments for `race` and `sweep`."""
        from ..training.schedule import Schedule

        return {
            "settings": self.settings or (),
            "seeds": self.seeds,
            "steps": self.steps,
            "baseline": self.baseline,
            "schedule": Schedule(self.schedule, self.warmup),
        }


@dataclass(frozen=True)
class RunOptions:
    """Where an experiment runs, and what it leaves there."""

    context: typer.Context
    out: Annotated[
        Path | None,
        path_option("Output directory. Default: runs/, with a name made from the command and the task."),
    ] = None
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete the earlier experiment in --out instead of resuming it.")
    ] = False
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="SQLAlchemy URL of a PostgreSQL database, which workers on several machines can share. "
            "Default: a SQLite file in --out.",
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(help="Number of worker processes. Default: one per CPU core, or 1 on a GPU."),
    ] = None
    threads: Annotated[int, typer.Option(help="CPU threads per worker.")] = 1
    device: DeviceOption = "auto"

    def directory(self, name: str) -> Path:
        """Return the directory; `name` is its default in `runs`. A foreign page there is refused."""
        return page_path(self.out or Path("runs", name)).parent  # refused now rather than after the run

    def count(self) -> int:
        """Set the threads of this process and return how many processes shall share the trials."""
        return count_workers(self.workers, parse_device(self.device), self.threads)

    def arguments(
        self, command: Sequence[str] | None = None, tensorboard: Path | None = None
    ) -> dict[str, Any]:
        """Return the arguments of an experiment that say where it runs; `callback` starts the other workers.

        Their `command` line is by default this process's. TensorBoard's runs go to the folder `tensorboard`.
        """
        from ..progress import Callback, Several
        from ..progress.live import Live
        from ..progress.plain import Plain
        from ..progress.tensorboard import TensorBoard

        number, callback = self.count(), Callback()
        if is_worker():
            end_with_parent()
        else:
            console = make_console()
            shown = Live(console) if console.is_terminal else Plain()
            boards = [TensorBoard(tensorboard)] if tensorboard else []
            callback = Several(Workers(command or self.context.obj, number), shown, *boards)
        return {"callback": callback, "storage": self.storage, "fresh": self.fresh and not is_worker()}


def split_names(text: str) -> list[str]:
    """Return the names of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def make_console(width: int = _LOG_WIDTH) -> Console:
    """Return a console for the terminal, or of a fixed width for a pipe or file."""
    from rich.console import Console

    # A name such as mine:factory: is no emoji, and [x] no style.
    plain: dict[str, Any] = {"emoji": False, "markup": False}
    console = Console(**plain)
    # A pipe has no width; rich would assume a narrow terminal and wrap the table's lines.
    return console if console.is_terminal else Console(width=width, **plain)


def parse_device(name: str) -> torch.device:
    """Return the device of a name, or raise ``LabError`` if this machine has none."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # mps is not supported, because the lab computes means in float64, which mps does not have.
    if not _DEVICE.fullmatch(name):
        raise LabError(f"unknown device {name!r}: choose auto, cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LabError(f"this machine has no device {name!r}") from error
    return device


def parse_dtype(name: str, *others: str) -> torch.dtype:
    """Return the dtype of a name, or raise ``LabError``; ``others`` are listed as valid, too."""
    if name not in DTYPES:
        raise LabError(f"unknown dtype {name!r}: choose {', '.join([*DTYPES, *others])}")
    import torch

    return getattr(torch, name)  # type: ignore[no-any-return]
