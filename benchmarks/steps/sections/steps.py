"""Step times of all optimizers, compared with their peers and with the hardware limits."""

from __future__ import annotations

from collections.abc import Iterator

from steepest.model_shapes import ModelShapes

from ..compare import compare
from ..config import BenchConfig, log
from ..groups import Group
from ..peers import PEERS, REDUNDANT
from ..profiling import MEMORY_SOURCE
from ..results import Column, Result, Row

_ALWAYS = (
    Column("label", "optimizer"),
    Column("source", "from"),
    Column("how", "how"),
    Column("step_ms", "step, ms", "ms"),
    Column("times_ours", "× ours", "ratio"),
)
_BYTES = (Column("least_per_parameter", "least B/param", "ms"),)
_FLOPS = (Column("gflop", "Gflop", "ms"),)
_LIMIT = (
    Column("limit_ms", "limit, ms", "ms"),
    Column("of_limit", "of the limit", "percent"),
)
_LAST = (
    Column("temporary_bytes", "temporary", "bytes"),
    Column("state_per_parameter", "state B/param", "ratio"),
)
_ON_CUDA = (
    Column("launches", "kernels", "count"),
    Column("device_ms", "on the device, ms", "ms"),
    Column("graph", "CUDA graph"),
)
_REASON = (Column("reason", ""),)

# A note mentions these instead of rows without numbers.
_ABSENT = ("not installed", "eager only")


def run(config: BenchConfig) -> Iterator[Result]:
    """Yield tables per model: one for the element rules, and one per subset of matrices for the others."""
    for shapes in config.models:
        for scope in ("element", "matrix"):
            for subset in ("all", "hidden", "attention"):
                groups = [g for g in config.groups if g.scope == scope and g.subset == subset]
                rows: list[Row] = []
                for group in groups:
                    log(f"{shapes.title}: {group.name}")
                    rows += compare(group, shapes, config)
                if groups:
                    yield _table(rows, shapes, groups, config)


def _table(measured: list[Row], shapes: ModelShapes, groups: list[Group], config: BenchConfig) -> Result:
    first, on_cuda = groups[0], config.device.type == "cuda"
    flops = [row.get("flops") for row in measured]
    measured = [{**row, "gflop": f / 1e9 if f else None} for row, f in zip(measured, flops, strict=True)]
    rows = [row for row in measured if row["status"] not in _ABSENT]
    absent = [row for row in measured if row["status"] in _ABSENT]
    tensors = first.tensors(shapes, config.blocks)
    count = sum(tensor.numel for tensor in tensors)
    kind = "Element rules" if first.scope == "element" else "Matrix rules"
    title = f"{kind}: {shapes.title}, {_which(first, shapes, config)}, {count:,} parameters"
    columns: tuple[Column, ...] = _ALWAYS
    if first.scope == "element":
        # On CUDA the reference is copy's bandwidth, on a CPU axpy's.
        columns += (*_BYTES, *_LIMIT, Column("of_copy", "of copy", "percent"))
    else:
        columns += _FLOPS + _LIMIT
    columns += _LAST + (_ON_CUDA if on_cuda else ()) + _REASON
    notes = _notes(first, config) + _omitted_notes(groups, config) + _absent_notes(absent)
    return Result("steps", title, columns, rows, notes)


def _omitted_notes(groups: list[Group], config: BenchConfig) -> list[str]:
    """Return a note about the peers that only --full measures."""
    with_peers = {group.name for group in groups if any(not case.ours for case in group.cases)}
    omitted = (e for name in with_peers for e in PEERS.get(name, ()) if (name, e.label) in REDUNDANT)
    names = sorted(f"{case.source}'s {case.label}" for case in omitted)
    if config.full or not names:
        return []
    return [f"Measured only with --full, because they compile for half a minute: {', '.join(names)}."]


def _absent_notes(rows: list[Row]) -> list[str]:
    """Return notes about packages that are not installed and optimizers without a compiled step."""
    missing = ", ".join(dict.fromkeys(row["source"] for row in rows if row["status"] == "not installed"))
    eager = ", ".join(dict.fromkeys(row["label"] for row in rows if row["status"] == "eager only"))
    return [f"Not installed: {missing}."] * bool(missing) + [
        f"With compile=True these still run eagerly, so only their eager steps are shown: {eager}."
    ] * bool(eager)


def _which(group: Group, shapes: ModelShapes, config: BenchConfig) -> str:
    tensors = group.tensors(shapes, config.blocks)
    if group.subset == "all":
        return f"all {len(tensors)} tensors"
    of = f"of all {shapes.blocks} blocks"
    if config.blocks is not None and config.blocks < shapes.blocks:
        of = f"of {config.blocks} of {shapes.blocks} blocks"
    return f"{len(tensors)} {'attention' if group.subset == 'attention' else 'hidden'} matrices {of}"


def _notes(group: Group, config: BenchConfig) -> list[str]:
    notes = [
        f"Medians of {config.rounds} interleaved rounds of all cases of a group and axpy over the same "
        "tensors, on shared parameters and gradients; ratios are medians of the ratios in each round. Each "
        "group starts with its own axpy row.",
        f"Temporary: {MEMORY_SOURCE.get(config.device.type, 'unknown on this device')}.",
    ]
    if config.device.type == "cuda":
        notes.append(
            "Kernels and device time are those of one profiled step; a step that takes longer waits for the "
            "host. graph: constructed with capturable=True and a learning rate on the device, compiled if "
            "possible, captured in a CUDA graph and replayed; its memory stays in the graph's private pool. "
            "CUDA graph: whether a peer's step can be captured."
        )
    if group.scope == "element":
        return [
            "Limit: the least bytes (read parameters, gradients and state, write parameters and state) at "
            "the rate of the group's axpy. A peer's least bytes are computed with our state. Of copy: the "
            "rate of moving the least bytes as a percentage of the rate of p ← g over the same tensors in "
            "the same rounds.",
            *notes,
        ]
    return [
        "Limit: the time of the step's own matrix products, each shape timed alone in the same rounds and "
        "multiplied by its count. Fewer products mean a lower limit, so compare steps by their time. "
        "Products inside compiler-generated kernels are not found; there the bytes are the limit.",
        *notes,
    ]
