"""`steepest plan-sharded`: what each rank of a mesh computes and sends."""

from __future__ import annotations

import math
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steepest.model_shapes import MODELS, model_shapes

from ..defaults import DTYPES
from ..errors import LabError
from .mesh import LayoutOption, mesh_options
from .options import ModelOption, parse_dtype

if TYPE_CHECKING:
    from ..bench.models import Shapes

# An H100 with InfiniBand.
FLOPS, NEAR, FAR = 500.0, 360.0, 45.0


def plan_sharded_command(
    mesh: Annotated[
        list[str],
        typer.Option(metavar="SIZExSIZE…", help="A device mesh, such as 8x64. Repeat it to compare several."),
    ],
    model: ModelOption,
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
    from steepest.planning import plan_sharded
    from steepest.planning.table import meshes_table

    if not all(0 < each < math.inf for each in (node, tflops, near, far)):
        raise LabError("--node, --tflops, --near and --far must be positive")
    options: dict[str, Any] = {"rule": rule, "dtype": parse_dtype(dtype), "node": node}
    if exchange_dtype is not None:
        options["exchange_dtype"] = parse_dtype(exchange_dtype)
    if bucket_bytes is not None:
        options["bucket_bytes"] = bucket_bytes
    listed = matrices(model)
    try:
        plans = {each: plan_sharded(listed, **mesh_options(each, layout), **options) for each in mesh}
    except (ValueError, TypeError) as error:
        raise LabError(str(error)) from error
    print(f"{rule}: {len(listed)} matrices, {sum(math.prod(shape) for _, shape in listed):,} elements\n")
    print(meshes_table(plans, 1e12 * tflops, 1e9 * near, 1e9 * far))
    note = (
        f"Estimated for devices of {tflops:g} TFLOP/s that send {near:g} GB/s within a node of {node}, "
        f"and {far:g} GB/s between nodes. Compute and exchange overlap. Replicas: ranks that share work on a "
        "matrix. Sent: the mean over the ranks. Everywhere: the time if every rank computed all matrices."
    )
    print(fill(note, 110))
    for each, found in plans.items() if owners else ():
        print(f"\nOwners on {each}\n\n{found}")
    return 0


def matrices(text: str) -> Shapes:
    """Return names and shapes of a model's hidden matrices, or of your model's or file's matrices."""
    if text in MODELS:
        return [(tensor.name, tensor.shape) for tensor in model_shapes(text).hidden()]
    from ..bench.models import find_shapes, make_model

    if ":" in text:
        pairs = [(name, tuple(param.shape)) for name, param in make_model(text).named_parameters()]
    else:
        pairs = find_shapes(text)
    return [(name, shape) for name, shape in pairs if len(shape) > 1]  # the others are left to other rules
