"""The command line: one function per command, a thin layer over the Python API."""

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

from . import corpus, plan_sharded
from .bench import bench
from .bench.callbacks import ProgressBar
from .bench.callbacks import TextLog as BenchTextLog
from .bench.params import num_threads
from .bench.plot import DPI, plot
from .bench.runner import DEFAULT_MODELS, DTYPES, PLOT, REPORT, ROUNDS
from .bench.sections import ON_REQUEST, SECTIONS
from .bench.shapes import MODELS, PLANNED_MODELS
from .bench.terminal import table as bench_table
from .errors import LabError
from .models.gpt import GPTConfig
from .progress import Callback
from .progress.live_table import LiveTable
from .progress.text_log import TextLog
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
    """The values of `race --task`."""

    text = "text"
    digits = "digits"
    ternary = "ternary"


class DigitModel(str, Enum):
    """The models of the digits task."""

    mlp = "mlp"
    convnet = "convnet"


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status.

    A bad request prints one line on standard error and returns 2.
    """
    try:
        status = app(args=list(arguments), prog_name="steepest", standalone_mode=False)
    except LabError as error:
        return _report_error(str(error))
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        # Typer's usage errors have this method. Typer would print them in a box; one line is enough.
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        return _report_error(format_message()) if format_message() else BAD_REQUEST
    return status if isinstance(status, int) else 0


def _report_error(text: str) -> int:
    print(f"steepest: error: {' '.join(text.split())}", file=sys.stderr)
    return BAD_REQUEST


def _version(requested: bool) -> None:
    if requested:
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
        console = _console()
        names = _names(optimizers)
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
    from .ternary import run_study
    from .ternary.report import table as markdown
    from .ternary.report import write

    try:
        torch.set_num_threads(threads)
        console = _console()
        results = run_study(
            directory, steps=steps, trials=trials, seeds=seeds, fresh=fresh, callback=_callback(console)
        )
        page = write(directory, results)
        console.print(markdown(results), markup=False, highlight=False)
        console.print(f"report: {page}", highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        return _interrupted(directory)
    return 0


@app.command("bench")
def bench_command(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,…", help=f"Models whose parameter shapes are used: {', '.join(MODELS)}."
        ),
    ] = ",".join(DEFAULT_MODELS),
    optimizers: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,…",
            help="Optimizers to measure; machine, symmetric, polar, ternary and sharded ignore it.",
            show_default=False,
        ),
    ] = None,
    sections: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,…",
            help=f"Sections to run: {', '.join(SECTIONS)}. Default: all but {', '.join(ON_REQUEST)}.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="Device.")] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="|".join(DTYPES), help="Dtype of parameters and gradients.")
    ] = "float32",
    rounds: Annotated[
        int, typer.Option(help="Rounds per measurement; use at least 9 for publishable results.")
    ] = ROUNDS,
    blocks: Annotated[
        int | None,
        typer.Option(
            help="Number of the model's blocks whose hidden matrices the matrix rules update; 0: all. "
            "Default: 1 on a CPU, all elsewhere.",
            show_default=False,
        ),
    ] = None,
    peers: Annotated[bool, typer.Option(help="Also measure other installed packages' optimizers.")] = True,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Measure steepest's optimizers compiled.")
    ] = True,
    eager: Annotated[
        bool, typer.Option("--eager/--no-eager", help="Measure steepest's optimizers in eager mode.")
    ] = True,
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            help="Memory limit of one measurement. Default: 0.6 of the free memory.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads. Default: torch's.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for results, tables and plot.")] = Path("runs/bench"),
    json: Annotated[
        Path | None, typer.Option("--json", help="Also write the results to this file.", show_default=False)
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Run all measurements: the first steps of all rules instead of three, the steps of the "
            "largest model, redundant peers. On two cores this takes fifteen minutes instead of ten. "
            "Optimizers named by --optimizers are always measured in full.",
        ),
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Smoke test: a toy model and three rounds.")] = False,
) -> int:
    """Measure the cost of the optimizers' steps and compare it with the hardware limits.

    Measures step times, interleaved with memory bandwidth (axpy), matrix products and the same
    optimizers of other packages; temporary memory; optimizer state; the first compiled step with a cold
    and a warm cache; ternary layers against dense ones; and the bandwidth of packing and flipping.
    Compare only ratios from one run, because a machine's speed changes from minute to minute.

    The output directory contains RESULTS.md, bench.json and bench.png. Ctrl-C keeps all results
    measured so far.
    """
    if threads is not None and threads < 1:
        raise LabError(f"threads must be at least 1, got {threads}")
    console = _console()
    wide = Console(width=max(console.width, _BENCH_WIDTH)) if not console.is_terminal else console
    try:
        with num_threads(threads):
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
                callback=ProgressBar(console) if console.is_terminal else BenchTextLog(),
            )
    except KeyboardInterrupt:
        print("interrupted before the first measurement", file=sys.stderr)
        return INTERRUPTED
    for result in record.results:
        wide.print(bench_table(result, wide.width))
    if json is not None:
        record.save(json)
    figure = plot(record)
    if figure is not None:
        figure.savefig(out / PLOT, dpi=DPI)
    console.print(f"results: {out / REPORT}", highlight=False, soft_wrap=True)
    if record.interrupted:
        print(f"interrupted: {out} contains the results so far", file=sys.stderr)
        return INTERRUPTED
    return 0


@app.command("plan-sharded")
def plan_sharded_command(
    mesh: Annotated[
        list[str],
        typer.Option(metavar="SIZExSIZE…", help="A device mesh, as in 8x64; give several to compare."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help=f"A model whose hidden matrices are planned for: {', '.join(PLANNED_MODELS)}.",
            show_default=False,
        ),
    ] = None,
    shapes: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a model, a file of names and shapes: JSON ({name: [rows, columns]}) or CSV "
            "(name,ROWSxCOLUMNS).",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="PLACEMENT,…",
            help="For each mesh dimension replicate or shard(DIMENSION). Default: shard(0) in the last one, "
            "replicate in the others.",
            show_default=False,
        ),
    ] = None,
    rule: Annotated[str, typer.Option(help="A matrix rule.")] = "muon",
    dtype: Annotated[str, typer.Option(metavar="|".join(DTYPES), help="Dtype of parameters.")] = "float32",
    exchange_dtype: Annotated[
        str | None,
        typer.Option(metavar="|".join(DTYPES), help="Dtype in which matrices travel.", show_default=False),
    ] = None,
    bucket_bytes: Annotated[
        int | None,
        typer.Option(help="Working memory of a wave at its owner. Default: the rule's.", show_default=False),
    ] = None,
    node: Annotated[int, typer.Option(help="Ranks of a node.")] = 8,
    tflops: Annotated[float, typer.Option(help="TFLOP/s of a device.")] = plan_sharded.FLOPS,
    near: Annotated[
        float, typer.Option(help="GB/s that a device sends within its node.")
    ] = plan_sharded.NEAR,
    far: Annotated[float, typer.Option(help="GB/s of a device to other nodes.")] = plan_sharded.FAR,
    owners: Annotated[bool, typer.Option("--owners", help="Also list each mesh's owners.")] = False,
) -> int:
    """Plan the sharded steps of a matrix rule: owners, waves, bytes and balance, without processes.

    The optimizer's steps follow the same plan. Times are on paper, from the rates given.
    """
    if min(node, tflops, near, far) <= 0:
        raise LabError("--node, --tflops, --near and --far must be positive")
    options: dict[str, Any] = {"dtype": _dtype(dtype)}
    if exchange_dtype is not None:
        options["exchange_dtype"] = _dtype(exchange_dtype)
    if bucket_bytes is not None:
        options["bucket_bytes"] = bucket_bytes
    listed = plan_sharded.shapes_of(model, shapes)
    console = _console()
    wide = Console(width=max(console.width, _BENCH_WIDTH)) if not console.is_terminal else console
    result = plan_sharded.compare(
        listed, mesh, layout, rule, node=node, flops=tflops, near=near, far=far, **options
    )
    wide.print(bench_table(result, wide.width))
    for text in mesh if owners else ():
        sizes = plan_sharded.mesh_of(text)
        found = plan_sharded.plan(listed, sizes, plan_sharded.layout_of(layout, sizes), rule, node, **options)
        wide.print(bench_table(plan_sharded.owners(found), wide.width))
    return 0


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise LabError(f"no dtype {name!r}: give {', '.join(DTYPES)}")
    return DTYPES[name]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _console() -> Console:
    # A pipe has no width; rich would assume a narrow terminal and wrap the table's lines.
    console = Console()
    return console if console.is_terminal else Console(width=_LOG_WIDTH)


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
    chosen = _device(device)
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


def _device(name: str) -> torch.device:
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
