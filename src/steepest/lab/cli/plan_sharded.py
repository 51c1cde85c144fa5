"""`steepest plan-sharded`: what each process of a mesh computes and sends."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import plan_sharded
from ..bench.runner import DTYPES
from ..bench.shapes import PLANNED_MODELS
from ..bench.terminal import table as bench_table
from ..errors import LabError
from .options import make_wide_console, parse_dtype


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
    options: dict[str, Any] = {"dtype": parse_dtype(dtype)}
    if exchange_dtype is not None:
        options["exchange_dtype"] = parse_dtype(exchange_dtype)
    if bucket_bytes is not None:
        options["bucket_bytes"] = bucket_bytes
    listed = plan_sharded.shapes_of(model, shapes)
    wide = make_wide_console()
    result = plan_sharded.compare(
        listed, mesh, layout, rule, node=node, flops=tflops, near=near, far=far, **options
    )
    wide.print(bench_table(result, wide.width))
    for text in mesh if owners else ():
        sizes = plan_sharded.mesh_of(text)
        found = plan_sharded.plan(listed, sizes, plan_sharded.layout_of(layout, sizes), rule, node, **options)
        wide.print(bench_table(plan_sharded.owners(found), wide.width))
    return 0
