"""`steepest plan-sharded`: what each rank of a mesh computes and sends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bench.shapes import MODELS, model_shapes
from ..defaults import DTYPES
from ..errors import LabError
from .completion import complete_models
from .mesh import LayoutOption, mesh_options, parse_layout, parse_mesh
from .options import make_console, parse_dtype

if TYPE_CHECKING:
    from rich.table import Table

    from steepest.planning import ShardedPlan

    from ..bench.models import Shapes

# An H100 with InfiniBand.
FLOPS, NEAR, FAR = 500.0, 360.0, 45.0

Row = dict[str, str | int | float]


def plan_sharded_command(
    mesh: Annotated[
        list[str],
        typer.Option(metavar="SIZExSIZE…", help="A device mesh, such as 8x64. Repeat it to compare several."),
    ],
    shapes: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help=f"The model whose hidden matrices are used: {', '.join(MODELS)}; or a file of names and "
            "shapes, as JSON ({name: [rows, columns]}) or CSV (name,ROWSxCOLUMNS).",
            autocompletion=complete_models,
        ),
    ],
    layout: LayoutOption = None,
    rule: Annotated[
        str, typer.Option(metavar="NAME", help="The matrix rule, such as muon or soap.")
    ] = "muon",
    dtype: Annotated[
        str, typer.Option(metavar="|".join(DTYPES), help="Dtype of the parameters.")
    ] = "float32",
    exchange_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(DTYPES),
            help="Dtype in which matrices are sent. Default: the one they are computed in.",
        ),
    ] = None,
    bucket_bytes: Annotated[
        int | None,
        typer.Option(help="Bytes that a wave may take in an owner's memory. Default: the rule's."),
    ] = None,
    node: Annotated[int, typer.Option(help="Ranks per node.")] = 8,
    tflops: Annotated[float, typer.Option(help="TFLOP/s per device.")] = FLOPS,
    near: Annotated[float, typer.Option(help="GB/s per device within a node.")] = NEAR,
    far: Annotated[float, typer.Option(help="GB/s per device between nodes.")] = FAR,
    owners: Annotated[
        bool, typer.Option("--owners", help="Also list which rank owns which matrices.")
    ] = False,
) -> int:
    """Plan how a matrix rule steps on a mesh: owners, waves, bytes sent and balance. Starts no process.

    The optimizer itself follows the same plan. Times are estimates from the rates that you give.
    """
    import torch

    if min(node, tflops, near, far) <= 0:
        raise LabError("--node, --tflops, --near and --far must be positive")
    options: dict[str, Any] = {"dtype": parse_dtype(dtype), "node": node}
    if exchange_dtype is not None:
        options["exchange_dtype"] = parse_dtype(exchange_dtype)
    if bucket_bytes is not None:
        options["bucket_bytes"] = bucket_bytes
    listed = matrices(shapes)
    plans, rows = [], []
    for text in mesh:
        plans.append(plan(listed, text, layout, rule, **options))
        narrow = plan(listed, text, layout, rule, **{**options, "exchange_dtype": torch.bfloat16})
        rows.append(mesh_row(text, layout, plans[-1], narrow, 1e12 * tflops, 1e9 * near, 1e9 * far))
    console = make_console(width=180)
    elements = sum(torch.Size(shape).numel() for _, shape in listed)
    note = (
        f"Estimated for devices of {tflops:g} TFLOP/s that send {near:g} GB/s within a node of {node}, "
        f"and {far:g} GB/s between nodes. Compute and exchange overlap. Replicas: ranks that share work on a "
        "matrix. Sent: the mean over the ranks. Everywhere: the time if every rank computed all matrices."
    )
    console.print(_table(f"{rule}: {len(listed)} matrices, {elements:,} elements", rows, note))
    for found in plans if owners else ():
        console.print(_table(f"Owners on {found.ranks} ranks", owner_rows(found)))
    return 0


def matrices(text: str) -> Shapes:
    """Return names and shapes of a model's hidden matrices, or of the matrices that a file lists."""
    if text in MODELS:
        return [(tensor.name, tensor.shape) for tensor in model_shapes(text).hidden()]
    from ..bench.models import find_shapes

    # Matrix rules leave vectors to other rules.
    return [(name, shape) for name, shape in find_shapes(text) if len(shape) > 1]


def plan(shapes: Shapes, mesh: str, layout: str | None, rule: str, **options: Any) -> ShardedPlan:
    """Plan for a mesh and a layout as words, or raise ``LabError``; `options` are those of `plan_sharded`."""
    from steepest.planning import plan_sharded

    where = mesh_options(mesh, layout)
    try:
        return plan_sharded(shapes, rule=rule, **where, **options)
    except (ValueError, TypeError) as error:
        raise LabError(str(error)) from error


def mesh_row(
    mesh: str,
    layout: str | None,
    found: ShardedPlan,
    narrow: ShardedPlan,
    flops: float,
    near: float,
    far: float,
) -> Row:
    """Return the table's row of a mesh; `narrow` is its plan with exchanges in bfloat16."""
    work = found.work
    return {
        "mesh": mesh,
        "layout": ", ".join(parse_layout(layout, parse_mesh(mesh))),
        "replicas": found.replicas,
        "units": len(found.units),
        "waves": work.waves,
        "max/mean load": work.balance,
        "sent, MiB": found.sent / 2**20,
        "most in a wave, MiB": work.working_bytes / 2**20,
        "compute, ms": 1e3 * found.compute_seconds(flops),
        "exchange, ms": 1e3 * found.exchange_seconds(near, far),
        "in bfloat16, ms": 1e3 * narrow.exchange_seconds(near, far),
        "everywhere, ms": 1e3 * sum(unit.cost for unit in found.units) / flops,
    }


def owner_rows(found: ShardedPlan) -> list[Row]:
    """Return a row for each matrix; those whose names differ only in numbers share one."""
    together: dict[tuple[str, tuple[int, ...]], list[Any]] = {}
    for unit in found.units:
        together.setdefault((re.sub(r"\d+", "*", unit.name), unit.shape), []).append(unit)
    rows: list[Row] = []
    for (name, shape), units in together.items():
        ranks = [unit.owner for unit in units]
        rows.append(
            {
                "matrix": f"{name} ({len(units)})" if len(units) > 1 else units[0].name,
                "shape": "×".join(map(str, shape)),
                "Gflop each": units[0].cost / 1e9,
                "owners": "all" if None in ranks else " ".join(map(str, ranks)),
            }
        )
    return rows


def _table(title: str, rows: Sequence[Row], note: str = "") -> Table:
    from rich.table import Table

    table = Table(title=title, caption=note, title_justify="left", caption_justify="left")
    for header, value in rows[0].items():
        table.add_column(header, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(_format(value) for value in row.values()))
    return table


def _format(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value < 1 else f"{value:.2f}"
    return value if isinstance(value, str) else f"{value:,}"
