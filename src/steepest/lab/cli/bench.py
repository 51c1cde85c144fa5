"""`steepest bench`: what a step of each optimizer costs on a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..defaults import BENCH_BASELINE, BENCH_OPTIMIZERS, LEAST_ROUNDS
from ..errors import LabError
from ..files import page_path
from .completion import complete_optimizers
from .finish import finish
from .options import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    SettingsOption,
    make_console,
    parse_device,
    parse_dtype,
    split_names,
)
from .paths import path_option

if TYPE_CHECKING:
    from rich.table import Table

    from ..bench.costs import StepCosts
    from ..records import Experiment


def bench_command(
    model: ModelOption = "gpt2-124m",
    optimizers: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,…",
            help="Optimizers to measure: steepest's by name, any other by its import path, such as "
            "torch.optim:SGD.",
            autocompletion=complete_optimizers,
        ),
    ] = ", ".join(BENCH_OPTIMIZERS),
    baseline: Annotated[
        str, typer.Option(metavar="NAME", help="The optimizer that you use now; ratios are to its times.")
    ] = BENCH_BASELINE,
    settings: SettingsOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the steps of steepest's optimizers, or not. Default: where it pays off.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = LEAST_ROUNDS,
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB", help="Memory that the measurement may use. Default: 70% of what is free."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=4096, help="CPU threads. Default: torch's own choice.")
    ] = None,
    out: Annotated[Path, path_option("Output directory.")] = Path("runs/bench"),
) -> int:
    """Measure what a step of each optimizer costs next to your present one: time, peak memory and state.

    The optimizers take turns on the same parameters, because a machine's speed changes from minute to minute:
    compare ratios within a run, not times between runs. What does not fit into memory is planned on the meta
    device and marked so.
    """
    import torch

    from ..bench.run import bench

    console = make_console()
    if threads is not None:
        torch.set_num_threads(threads)
    if memory is not None and not 0 < memory < float("inf"):
        raise LabError(f"--memory must be a positive number of GiB, got {memory:g}")
    page_path(out)  # refused now rather than after the measurement
    with console.status("") as status:
        experiment, found = bench(
            model,
            split_names(optimizers),
            baseline=baseline,
            settings=settings or (),
            device=parse_device(device),
            dtype=None if dtype is None else parse_dtype(dtype),
            rounds=rounds,
            compiled=compiled,
            memory=None if memory is None else int(memory * 2**30),
            out=out,
            on_progress=lambda text, fraction: status.update(f"{text}: {fraction:.0%}"),
        )
    console.print(bench_table(experiment, found))
    for label, reason in found.failed.items():
        console.print(f"{label} was not measured: {reason}", highlight=False, markup=False)
    return finish(out, tables=False)


def bench_table(experiment: Experiment, found: StepCosts) -> Table:
    """Return a table with a row for each optimizer."""
    from rich.table import Table

    from ..report.table import number

    left: dict[str, Any] = {"title_justify": "left", "caption_justify": "left"}
    table = Table(title=experiment.title, caption=" ".join(experiment.notes), **left)
    table.add_column("optimizer", style="bold")
    for header in ("step, ms", f"× {experiment.baseline}", "peak, MiB", "state, MiB", "B/param", "bandwidth"):
        table.add_column(header, justify="right")
    for label, cost in found.costs.items():
        table.add_row(
            label,
            "planned" if cost.optimizer_ms is None else number(cost.optimizer_ms),
            "" if cost.ratio is None else f"{cost.ratio:.2f}",
            "" if cost.peak_bytes is None else f"{cost.peak_bytes / 2**20:,.1f}",
            f"{cost.state_bytes / 2**20:,.1f}",
            f"{cost.state_bytes / cost.parameters:.2f}",
            "" if cost.bandwidth is None else f"{cost.bandwidth:.0%}",
        )
    return table
