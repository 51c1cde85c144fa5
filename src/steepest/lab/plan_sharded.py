"""Compare how several device meshes would step a model's matrices, and list who computes which."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from steepest.planning import ShardedPlan, plan_sharded

from .bench.results import Column, Result
from .bench.shapes import planned_shapes
from .errors import LabError

Shapes = list[tuple[str, tuple[int, ...]]]

FLOPS, NEAR, FAR = 500.0, 360.0, 45.0
"""TFLOP/s of a device, and GB/s within a node and to other nodes, of a device: an H100 with InfiniBand."""

_MESH = re.compile(r"\d+(x\d+)*")
_SHARD = re.compile(r"shard\((\d+)\)")
_COLUMNS = (
    Column("mesh", "mesh"),
    Column("layout", "layout"),
    Column("replicas", "replicas", "count"),
    Column("units", "units", "count"),
    Column("waves", "waves", "count"),
    Column("balance", "max/mean load", "ratio"),
    Column("sent", "sent by a rank", "bytes"),
    Column("memory", "most in a wave", "bytes"),
    Column("compute_ms", "compute, ms", "ms"),
    Column("exchange_ms", "exchange, ms", "ms"),
    Column("narrow_ms", "in bfloat16, ms", "ms"),
    Column("everywhere_ms", "everywhere, ms", "ms"),
)
_OWNERS = (
    Column("name", "matrix"),
    Column("shape", "shape"),
    Column("gflop", "Gflop each", "rate"),
    Column("owners", "owners"),
)


def shapes_of(model: str | None, file: Path | None) -> Shapes:
    """Return names and shapes of a model's hidden matrices, or of the matrices that a file lists.

    Raises:
        LabError: neither or both were given; an unknown model; a file that cannot be read.
    """
    if (model is None) == (file is None):
        raise LabError("give --model or --shapes")
    if file is None:
        assert model is not None
        return [(tensor.name, tensor.shape) for tensor in planned_shapes(model).hidden()]
    # Matrix rules leave vectors to other rules.
    return [(name, shape) for name, shape in read_shapes(file) if len(shape) > 1]


def read_shapes(file: Path) -> Shapes:
    """Return the names and shapes that a file lists.

    Raises:
        LabError: the file cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            listed = json.loads(text)
            pairs = listed.items() if isinstance(listed, dict) else listed
            return [(str(name), tuple(map(int, shape))) for name, shape in pairs]
        rows = [row for row in csv.reader(text.splitlines()) if row]
        return [(name, tuple(map(int, shape.split("x")))) for name, shape in rows if shape != "shape"]
    except (OSError, ValueError, TypeError) as error:
        raise LabError(
            f"cannot read {file} as JSON ({{name: [rows, columns]}}) or CSV (name,ROWSxCOLUMNS): {error}"
        ) from error


def mesh_of(text: str) -> tuple[int, ...]:
    """Parse a mesh.

    Example:
        >>> mesh_of("8x64")
        (8, 64)
    """
    if not _MESH.fullmatch(text):
        raise LabError(f"no mesh {text!r}: give its sizes, as in 8 or 8x64")
    return tuple(map(int, text.split("x")))


def layout_of(text: str | None, mesh: Sequence[int]) -> list[str]:
    """Parse a layout; by default the last mesh dimension cuts rows, and the others replicate.

    Example:
        >>> layout_of("replicate, shard(0)", (8, 64)), layout_of(None, (8,))
        (['replicate', 'shard(0)'], ['shard(0)'])
    """
    if text is None:
        return ["replicate"] * (len(mesh) - 1) + ["shard(0)"]
    words = [word.strip().lower() for word in text.split(",")]
    for word in words:
        if word != "replicate" and not _SHARD.fullmatch(word):
            raise LabError(f"no placement {word!r}: give replicate or shard(DIMENSION), separated by commas")
    if len(words) != len(mesh):
        raise LabError(f"--layout has {len(words)} placements for a mesh of {len(mesh)} dimensions")
    return words


def placements_of(layout: Sequence[str]) -> list[Any]:
    """Return torch's placements of such words."""
    from torch.distributed.tensor import Replicate, Shard

    cuts = [_SHARD.fullmatch(word) for word in layout]
    return [Replicate() if cut is None else Shard(int(cut[1])) for cut in cuts]


def plan(
    shapes: Shapes, mesh: Sequence[int], layout: Sequence[str], rule: str, node: int, **options: Any
) -> ShardedPlan:
    """Call :func:`plan_sharded` with placements as words.

    Raises:
        LabError: the request is invalid.
    """
    try:
        return plan_sharded(shapes, mesh, placements_of(layout), rule, node=node, **options)
    except (ValueError, TypeError) as error:
        raise LabError(str(error)) from error


def compare(
    shapes: Shapes,
    meshes: Sequence[str],
    layout: str | None,
    rule: str,
    *,
    node: int = 8,
    flops: float = FLOPS,
    near: float = NEAR,
    far: float = FAR,
    **options: Any,
) -> Result:
    """Plan for every mesh, and return a table with a row for each.

    Args:
        shapes: names and shapes of the matrices.
        meshes: as in :func:`mesh_of`.
        layout: as in :func:`layout_of`.
        rule: a matrix rule.
        node: ranks of a node.
        flops: TFLOP/s of a device.
        near, far: GB/s that a device sends within its node and to other nodes.
        **options: the rule's.
    """
    rows = []
    for text in meshes:
        words = layout_of(layout, mesh_of(text))
        found = plan(shapes, mesh_of(text), words, rule, node, **options)
        narrow = plan(
            shapes, mesh_of(text), words, rule, node, **{**options, "exchange_dtype": torch.bfloat16}
        )
        work, cost = found.work, sum(unit.cost for unit in found.units)
        links = 1e9 * near, 1e9 * far
        rows.append(
            {
                "mesh": text,
                "layout": ", ".join(words),
                "replicas": found.replicas,
                "units": len(found.units),
                "waves": work.waves,
                "balance": work.balance,
                "sent": round(found.sent),
                "memory": work.working_bytes,
                "compute_ms": 1e3 * found.compute_seconds(1e12 * flops),
                "exchange_ms": 1e3 * found.exchange_seconds(*links),
                "narrow_ms": 1e3 * narrow.exchange_seconds(*links),
                "everywhere_ms": 1e3 * cost / (1e12 * flops),
            }
        )
    elements = sum(torch.Size(shape).numel() for _, shape in shapes)
    notes = [
        f"On paper: devices of {flops:g} TFLOP/s that send {near:g} GB/s within a node of {node} and {far:g} "
        "GB/s to other nodes. Compute and exchange overlap. Replicas: how many share the work on each "
        "matrix. Sent: the mean over the ranks. Everywhere: the time if every rank computes all matrices."
    ]
    title = f"{rule}: {len(shapes)} matrices, {elements:,} elements"
    return Result("plan", title, _COLUMNS, rows, notes)


def owners(found: ShardedPlan) -> Result:
    """Return a table of the owners; matrices whose names differ only in numbers share a row."""
    together: dict[tuple[str, tuple[int, ...]], list[Any]] = {}
    for unit in found.units:
        together.setdefault((re.sub(r"\d+", "*", unit.name), unit.shape), []).append(unit)
    rows = []
    for (name, shape), units in together.items():
        ranks = [unit.owner for unit in units]
        rows.append(
            {
                "name": f"{name} ({len(units)})" if len(units) > 1 else units[0].name,
                "shape": "×".join(map(str, shape)),
                "gflop": units[0].cost / 1e9,
                "owners": "all" if None in ranks else " ".join(map(str, ranks)),
            }
        )
    return Result(
        "plan", f"Owners on {found.ranks} ranks", _OWNERS, rows, ["In the order of the parameters."]
    )
