"""`steepest race`: train with several optimizers and write a report."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from .. import corpus
from ..errors import LabError
from ..models.gpt import GPTConfig
from ..progress import Callback
from ..progress.live_table import LiveTable
from ..progress.text_log import TextLog
from ..racing import DEFAULT_BUDGET, DEFAULT_OPTIMIZERS, race
from ..table import table
from ..task import Task
from ..tasks import digits_task, text_task
from .options import INTERRUPTED, make_console, parse_device, split_names


class TaskName(str, Enum):
    """The values of `race --task`."""

    text = "text"
    digits = "digits"
    ternary = "ternary"


class DigitModel(str, Enum):
    """The models of the digits task."""

    mlp = "mlp"
    convnet = "convnet"


def race_command(
    typer_context: typer.Context,
    task: Annotated[TaskName, typer.Option(help="The task to train on.")] = TaskName.text,
    optimizers: Annotated[
        str,
        typer.Option(metavar="NAME,NAME,…", help="Optimizers, named as in steepest.list_optimizers()."),
    ] = ",".join(DEFAULT_OPTIMIZERS),
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Time for the whole race: 90s, 5m, 1h or seconds. A measurement at the start converts it "
            f"into steps per trial. Default: {DEFAULT_BUDGET / 60:.0f}m, unless --steps is given.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of every trial, instead of --budget.", show_default=False)
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            help="Learning rates per optimizer, its default first. Default: 5 (ternary: 3).",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            help="Seeds at each optimizer's best learning rate. Default: 3 (ternary: 5 on digits).",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory for plan, records and report. Default: runs/race-TASK.", show_default=False
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the files of an earlier race.")] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            help="File or directory to train on. Default: the source of Python's standard library.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        DigitModel | None,
        typer.Option(help="Model of the digits task. Default: mlp.", show_default=False),
    ] = None,
    width: Annotated[int, typer.Option(help="GPT: features per position.")] = GPTConfig.width,
    depth: Annotated[int, typer.Option(help="GPT: number of blocks.")] = GPTConfig.depth,
    heads: Annotated[int, typer.Option(help="GPT: number of attention heads.")] = GPTConfig.heads,
    context: Annotated[int, typer.Option(help="GPT: context length in bytes.")] = GPTConfig.context,
    batch: Annotated[
        int | None,
        typer.Option(help="Windows (default 8) or images (default 64) per step.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="Training device.")] = "auto",
    threads: Annotated[
        int,
        typer.Option(
            help="CPU threads. More threads hardly speed up the default models, and slow them down on a "
            "busy machine; use more for larger models."
        ),
    ] = 1,
) -> int:
    """Race optimizers against each other and write a report.

    Every optimizer gets the same initial weights, the same data in the same order, the same schedule
    (warm-up, then cosine) and the same number of trials to find its learning rate, starting at its own
    default. More trials with other seeds then follow at each optimizer's best learning rate.

    To resume after Ctrl-C, run the command again with the same --out.

    --task ternary runs a separate study: float32, latent floats with a straight-through gradient, votes,
    Bop, and frozen random ternary weights, on digits and on text (about a quarter of an hour). It accepts
    only --steps, --trials, --seeds, --out, --fresh and --threads.

    The output directory contains report.html (a self-contained page), its plots as PNG, records.jsonl
    (a line per trial) and plan.json.
    """
    directory = Path("runs") / f"race-{task.value}" if out is None else out
    if threads < 1:
        raise LabError(f"threads must be at least 1, got {threads}")
    if task is TaskName.ternary:
        _reject_unsupported(typer_context)
        return _study(directory, steps, trials, seeds, fresh, threads)
    # Catch an interrupt here, whenever it comes, because Typer would handle it differently.
    try:
        torch.set_num_threads(threads)
        console = make_console()
        names = split_names(optimizers)
        result = race(
            _task(task, text, model, (width, depth, heads, context), batch, device),
            names,
            trials=5 if trials is None else trials,
            seeds=3 if seeds is None else seeds,
            steps=steps,
            budget=budget,
            out=directory,
            fresh=fresh,
            callback=_callback(console),
        )
        console.print(table(result.plan, result.records, console.width))
        console.print(f"report: {result.report}", highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        return _interrupted(directory)
    return 0


def _interrupted(directory: Path) -> int:
    print(f"interrupted: run the same command again to resume in {directory}", file=sys.stderr)
    return INTERRUPTED


def _reject_unsupported(context: typer.Context) -> None:
    """Raise ``LabError`` if the command line has an option that the ternary study does not support."""
    supported = {"task", "steps", "trials", "seeds", "out", "fresh", "threads"}
    for name in context.params:
        # Check the source and not the value: an explicit default would be ignored, too.
        source = context.get_parameter_source(name)
        if name not in supported and source is not None and source.name != "DEFAULT":
            raise LabError(f"--{name} cannot be combined with --task ternary, whose three races are fixed")


def _study(
    directory: Path, steps: int | None, trials: int | None, seeds: int | None, fresh: bool, threads: int
) -> int:
    """Run the study of ternary training."""
    from ..ternary import run_study
    from ..ternary.report import table as markdown
    from ..ternary.report import write

    try:
        torch.set_num_threads(threads)
        console = make_console()
        results = run_study(
            directory, steps=steps, trials=trials, seeds=seeds, fresh=fresh, callback=_callback(console)
        )
        page = write(directory, results)
        console.print(markdown(results), markup=False, highlight=False)
        console.print(f"report: {page}", highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        return _interrupted(directory)
    return 0


def _callback(console: Console) -> Callback:
    return LiveTable(console) if console.is_terminal else TextLog()


def _task(
    name: TaskName,
    text: Path | None,
    model: DigitModel | None,
    shape: tuple[int, int, int, int],
    batch: int | None,
    device: str,
) -> Task[Any]:
    chosen = parse_device(device)
    if batch is not None and batch < 1:
        raise LabError(f"batch must be at least 1, got {batch}")
    if name is TaskName.digits:
        if text is not None:
            raise LabError("--text requires --task text")
        return digits_task((model or DigitModel.mlp).value, batch=batch or 64, device=chosen)
    if model is not None:
        raise LabError("--model requires --task digits; the text task trains a GPT (--width, --depth, …)")
    try:
        config = GPTConfig(*shape)
    except ValueError as error:
        raise LabError(str(error)) from error
    source = corpus.standard_library() if text is None else corpus.from_path(text)
    return text_task(source, config, batch=batch or 8, device=chosen)
