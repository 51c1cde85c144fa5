"""The command line: one function per command, thin over the Python API."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import steepest

from . import corpus
from .bench import bench
from .bench.material import threads as bench_threads
from .bench.picture import DPI, picture
from .bench.running import DEFAULT_MODELS, DTYPES, PICTURE, REPORT, ROUNDS
from .bench.sections import SECTIONS
from .bench.shapes import SHAPE_LISTS
from .bench.terminal import table as bench_table
from .bench.watch import Live as BenchLive
from .bench.watch import Plain as BenchPlain
from .errors import LabError
from .models.gpt import GPTConfig
from .progress import Watcher
from .progress.live import Live
from .progress.plain import Plain
from .racing import DEFAULT_BUDGET, DEFAULT_OPTIMIZERS, race
from .table import table
from .task import Task
from .tasks import digits_task, text_task

INTERRUPTED = 130
BAD_REQUEST = 2

_LOG_WIDTH = 120
_BENCH_WIDTH = 180
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")

app = typer.Typer(
    name="steepest",
    help="Memory-lean optimizers for PyTorch: find out which one suits you.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


class TaskName(str, Enum):
    """The races that come with the lab."""

    text = "text"
    digits = "digits"
    ternary = "ternary"


class DigitModel(str, Enum):
    """The models of the digits race."""

    mlp = "mlp"
    convnet = "convnet"


def run(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit status.

    A bad request gets one line on standard error and status 2.
    """
    try:
        status = app(args=list(arguments), prog_name="steepest", standalone_mode=False)
    except LabError as error:
        return _complain(str(error))
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        # Typer's own complaints about the command line carry their wording in this method; it draws
        # a box around them where one line will do.
        wording = getattr(error, "format_message", None)
        if wording is None:
            raise
        return _complain(wording()) if wording() else BAD_REQUEST
    return status if isinstance(status, int) else 0


def _complain(text: str) -> int:
    print(f"steepest: error: {' '.join(text.split())}", file=sys.stderr)
    return BAD_REQUEST


def _version(wanted: bool) -> None:
    if wanted:
        print(f"steepest {steepest.__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _steepest(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    """Memory-lean optimizers for PyTorch: find out which one suits you."""


@app.command("race")
def race_command(
    given: typer.Context,
    task: Annotated[TaskName, typer.Option(help="What to train on.")] = TaskName.text,
    optimizers: Annotated[
        str, typer.Option(metavar="NAME,NAME,…", help="Who races; names as in steepest.list_optimizers().")
    ] = ",".join(DEFAULT_OPTIMIZERS),
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Time for the whole race: 90s, 5m, 1h or seconds. A measurement at the start turns it into "
            f"steps per trial. Default: {DEFAULT_BUDGET / 60:.0f}m, unless --steps is given.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of every trial, instead of --budget.", show_default=False)
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            help="Learning rates each optimizer tries, its default first. Default: 5 (ternary: 3).",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            help="Seeds for the best learning rate of each. Default: 3 (ternary: 5 on digits).",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for plan, records and report. Default: runs/race-TASK.", show_default=False
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what an earlier race left there.")] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A file or folder to train on. Default: the Python standard library's source.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        DigitModel | None, typer.Option(help="The digits' model. Default: mlp.", show_default=False)
    ] = None,
    width: Annotated[int, typer.Option(help="GPT: features per position.")] = GPTConfig.width,
    depth: Annotated[int, typer.Option(help="GPT: blocks.")] = GPTConfig.depth,
    heads: Annotated[int, typer.Option(help="GPT: attention heads.")] = GPTConfig.heads,
    context: Annotated[int, typer.Option(help="GPT: bytes it sees.")] = GPTConfig.context,
    batch: Annotated[
        int | None,
        typer.Option(help="Windows (default 8) or images (default 64) per step.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="Where to train.")] = "auto",
    threads: Annotated[
        int,
        typer.Option(
            help="CPU threads. The default models gain little from more, and on a busy machine threads that "
            "wait for each other stall; give more for bigger models."
        ),
    ] = 1,
) -> int:
    """Race optimizers against each other, and write a report.

    Every optimizer gets the same initial weights, the same data in the same order, the same schedule
    (warm-up, then cosine) and the same number of trials to find its learning rate, starting at its own
    default. The best learning rate of each is then trained with more seeds.

    Interrupted with Ctrl-C, it goes on where it stopped when it is run again with the same --out.
    --task ternary is a study of its own: float32, latent floats with a straight-through gradient, votes,
    Bop, and random ternary weights that stay, on digits and on text (a quarter of an hour or so). Of the
    options it takes --steps, --trials, --seeds, --out, --fresh and --threads.

    The folder then holds report.html (one page, everything embedded), its pictures as PNG,
    records.jsonl (a line per trial) and plan.json.
    """
    folder = Path("runs") / f"race-{task.value}" if out is None else out
    if threads < 1:
        raise LabError(f"threads must be at least 1, got {threads}")
    if task is TaskName.ternary:
        _refuse_given(given)
        return _study(folder, steps, trials, seeds, fresh, threads)
    # Typer would take an interrupt for itself, so it is met here, at whatever moment it comes.
    try:
        torch.set_num_threads(threads)
        console = _console()
        names = _names(optimizers)
        result = race(
            _task(task, text, model, (width, depth, heads, context), batch, device),
            names,
            trials=5 if trials is None else trials,
            seeds=3 if seeds is None else seeds,
            steps=steps,
            budget=budget,
            out=folder,
            fresh=fresh,
            watcher=_watcher(console),
        )
        console.print(table(result.plan, result.records, console.width))
        console.print(f"report: {result.report}", highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on from what {folder} holds", file=sys.stderr)
        return INTERRUPTED
    return 0


def _refuse_given(given: typer.Context) -> None:
    """Raise ``LabError`` if the command line has an option that the ternary study does not take."""
    taken = {"task", "steps", "trials", "seeds", "out", "fresh", "threads"}
    for name in given.params:
        # Told by its source: an option that is given its default would be ignored as well.
        source = given.get_parameter_source(name)
        if name not in taken and source is not None and source.name != "DEFAULT":
            raise LabError(f"--{name} does not go with --task ternary, whose three races are fixed")


def _study(
    folder: Path, steps: int | None, trials: int | None, seeds: int | None, fresh: bool, threads: int
) -> int:
    """The study of ternary training."""
    from .ternary import run_study
    from .ternary.report import table as markdown
    from .ternary.report import write

    try:
        torch.set_num_threads(threads)
        console = _console()
        results = run_study(
            folder, steps=steps, trials=trials, seeds=seeds, fresh=fresh, watcher=_watcher(console)
        )
        page = write(folder, results)
        console.print(markdown(results), markup=False, highlight=False)
        console.print(f"report: {page}", highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on from what {folder} holds", file=sys.stderr)
        return INTERRUPTED
    return 0


@app.command("bench")
def bench_command(
    model: Annotated[
        str, typer.Option(metavar="NAME,NAME,…", help=f"Whose shapes: {', '.join(SHAPE_LISTS)}.")
    ] = ",".join(DEFAULT_MODELS),
    optimizers: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,…",
            help="Which of ours; machine, symmetric and ternary are not about them. Default: all.",
            show_default=False,
        ),
    ] = None,
    sections: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,…",
            help=f"What to measure: {', '.join(SECTIONS)}. Default: all.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="Where to step.")] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="|".join(DTYPES), help="Of parameters and gradients.")
    ] = "float32",
    rounds: Annotated[int, typer.Option(help="Rounds of every measurement; 9 or more for results.")] = ROUNDS,
    blocks: Annotated[
        int | None,
        typer.Option(
            help="Matrix rules step the hidden matrices of so many of the model's blocks; 0: of all. "
            "Default: 1 on a CPU, all elsewhere.",
            show_default=False,
        ),
    ] = None,
    peers: Annotated[bool, typer.Option(help="Other packages' optimizers too, as installed.")] = True,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Ours compiled.")] = True,
    eager: Annotated[bool, typer.Option("--eager/--no-eager", help="Ours eager.")] = True,
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            help="Memory that one measurement may take. Default: 0.6 of what is free.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads. Default: torch's.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the record, the tables and the picture.")] = Path(
        "runs/bench"
    ),
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the record here too.", show_default=False)
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Leave nothing out: first steps of all rules and not of three, the largest model timed and "
            "not planned, peers that repeat others. A quarter of an hour on two cores instead of some ten "
            "minutes. What --optimizers names is measured in full.",
        ),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A toy model and three rounds: does it run at all?")
    ] = False,
) -> int:
    """Measure what the optimizers' steps cost, and what limits them.

    Step time beside bandwidth (axpy) and matrix products measured in the same rounds, beside the same
    optimizers of other packages; temporary memory; state; the first compiled step, cold and warm. Ternary
    layers beside dense ones, and packing and flipping at what bandwidth.
    Speeds are ratios within one run: a machine's own speed changes from minute to minute.

    The folder then holds RESULTS.md, bench.json and bench.png. Interrupted with Ctrl-C, they hold
    what had been measured by then.
    """
    if threads is not None and threads < 1:
        raise LabError(f"threads must be at least 1, got {threads}")
    console = _console()
    wide = Console(width=max(console.width, _BENCH_WIDTH)) if not console.is_terminal else console
    try:
        with bench_threads(threads):
            record = bench(
                ["tiny"] if quick else _names(model),
                None if optimizers is None else _names(optimizers),
                sections=None if sections is None else _names(sections),
                device=_device(device),
                dtype=dtype,
                rounds=3 if quick else rounds,
                blocks=blocks,
                eager=eager,
                compiled=compiled,
                peers=peers,
                memory=memory,
                full=full,
                out=out,
                watcher=BenchLive(console) if console.is_terminal else BenchPlain(),
            )
    except KeyboardInterrupt:
        print("interrupted before anything was measured", file=sys.stderr)
        return INTERRUPTED
    for result in record.results:
        wide.print(bench_table(result, wide.width))
    if json is not None:
        record.save(json)
    drawn = picture(record)
    if drawn is not None:
        drawn.savefig(out / PICTURE, dpi=DPI)
    console.print(f"results: {out / REPORT}", highlight=False, soft_wrap=True)
    if record.interrupted:
        print(f"interrupted: {out} holds what had been measured", file=sys.stderr)
        return INTERRUPTED
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _console() -> Console:
    # A pipe or a log has no width; rich would take it for a narrow terminal and break the table's lines.
    console = Console()
    return console if console.is_terminal else Console(width=_LOG_WIDTH)


def _watcher(console: Console) -> Watcher:
    return Live(console) if console.is_terminal else Plain()


def _task(
    name: TaskName,
    text: Path | None,
    model: DigitModel | None,
    shape: tuple[int, int, int, int],
    batch: int | None,
    device: str,
) -> Task[Any]:
    chosen = _device(device)
    if batch is not None and batch < 1:
        raise LabError(f"batch must be at least 1, got {batch}")
    if name is TaskName.digits:
        if text is not None:
            raise LabError("--text goes with --task text, not with --task digits")
        return digits_task((model or DigitModel.mlp).value, batch=batch or 64, device=chosen)
    if model is not None:
        raise LabError("--model goes with --task digits; the text race trains a GPT (--width, --depth, …)")
    try:
        config = GPTConfig(*shape)
    except ValueError as error:
        raise LabError(str(error)) from error
    source = corpus.standard_library() if text is None else corpus.from_path(text)
    return text_task(source, config, batch=batch or 8, device=chosen)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Not mps: the lab takes its means in double precision, which that device does not have.
    if not _DEVICE.fullmatch(name):
        raise LabError(f"no device {name!r}: give auto, cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LabError(f"no device {name!r} on this machine") from error
    return device
