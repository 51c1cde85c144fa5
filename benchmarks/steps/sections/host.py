"""Host overhead: the time of a step over a model's number of tensors when the tensors are tiny."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator

import torch

from steepest.model_shapes import ParamShape

from ..case import GRAPH, Case, failing_if_eager
from ..config import BenchConfig, log
from ..params import SharedParams
from ..results import Column, Result, Row, error_line

NUMEL = 64
"""Elements of each tensor, which fit into a few cache lines."""

# Larger than any processor's last-level cache, but a small part of a model.
_FLUSH_BYTES, _TOY_FLUSH_BYTES = 1 << 29, 1 << 20
_COLD = " after memory"

_COLUMNS = (
    Column("label", "optimizer"),
    Column("source", "from"),
    Column("how", "how"),
    Column("warm_ms", "caches warm, ms", "ms"),
    Column("cold_ms", "after memory, ms", "ms"),
    Column("per_tensor_us", "after memory, µs a tensor", "ms"),
    Column("reason", ""),
)
_NOTE = (
    "A step over as many tensors as the model has, of {numel} elements each, so that nearly all of its time "
    "is host overhead. Warm: consecutive steps. After memory: before each step {flushed} are read and "
    "written, untimed, which evicts the host's own data from the caches as a training step does. Medians of "
    "{rounds} interleaved rounds."
)


def run(config: BenchConfig) -> Iterator[Result]:
    """Yield a table for the first model with the cases of all element groups."""
    # Graphs have no host overhead.
    cases = {
        case.key: case
        for group in config.groups
        if group.scope == "element"
        for case in group.cases
        if case.how != GRAPH
    }
    if not cases:
        return
    shapes = config.models[0]
    log(f"host overhead with {shapes.title}'s number of tensors")
    flushed = _TOY_FLUSH_BYTES if config.toy else _FLUSH_BYTES
    tensors = [ParamShape(t.name, (NUMEL,)) for t in shapes.tensors]
    shared = SharedParams.create(tensors, config.device, config.dtype)
    memory = torch.zeros(flushed // 4, device=config.device)

    def flush_caches() -> None:
        memory.add_(1.0)
        shared.set_grads()

    calls: dict[str, Callable[[], object]] = {}
    setup: dict[str, Callable[[], object]] = {}
    rows: list[Row] = []
    for case in cases.values():
        row: Row = {"key": case.key, "label": case.label, "source": case.source, "how": case.how}
        rows.append({**row, "tensors": len(tensors), "reason": ""})
        try:
            calls[case.key] = calls[case.key + _COLD] = _warmed_up_step(case, shared)
        except Exception as error:
            rows[-1]["reason"] = error_line(error)
            continue
        setup |= {case.key: shared.set_grads, case.key + _COLD: flush_caches}
    times = config.time(calls, setup)
    for row in rows:
        if row["key"] in times:
            row |= {"warm_ms": times[row["key"]].median_ms, "cold_ms": times[row["key"] + _COLD].median_ms}
            row["per_tensor_us"] = 1e3 * row["cold_ms"] / row["tensors"]
    note = _NOTE.format(numel=NUMEL, flushed=f"{flushed >> 20} MiB", rounds=config.rounds)
    title = f"Host overhead: {shapes.title}, {len(tensors)} tensors"
    yield Result("host", title, _COLUMNS, rows, [note])


def _warmed_up_step(case: Case, shared: SharedParams) -> Callable[[], object]:
    """Return the case's step after two calls, which create the state and compile."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        optimizer = case.make(shared.params)
        with failing_if_eager():
            for _ in range(2):
                shared.set_grads()
                optimizer.step()
    return optimizer.step
