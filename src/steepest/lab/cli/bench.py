"""`steepest bench`: measure the cost of steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..bench import bench
from ..bench.callbacks import ProgressBar
from ..bench.callbacks import TextLog as BenchTextLog
from ..bench.params import num_threads
from ..bench.plot import DPI, plot
from ..bench.runner import DEFAULT_MODELS, DTYPES, PLOT, REPORT, ROUNDS
from ..bench.sections import ON_REQUEST, SECTIONS
from ..bench.shapes import MODELS
from ..bench.terminal import table as bench_table
from ..errors import LabError
from .options import INTERRUPTED, make_console, make_wide_console, parse_device, split_names


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
    console = make_console()
    wide = make_wide_console()
    try:
        with num_threads(threads):
            record = bench(
                ["tiny"] if quick else split_names(model),
                None if optimizers is None else split_names(optimizers),
                sections=None if sections is None else split_names(sections),
                device=parse_device(device),
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
