"""Host overhead: the time of a step over a model's number of tensors when the tensors are tiny."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator

import torch

from ...clock import now
from ..callbacks import Callback
from ..case import GRAPH, Case
from ..compile_check import require_compiled
from ..interleaved import Timer, error_line, time_interleaved
from ..params import SharedParams
from ..results import Column, Result, Row
from ..section import BenchConfig
from ..shapes import ModelShapes, ParamShape

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


class Host:
    """A table for the first model with the cases of all element groups."""

    name = "host"

    def work_units(self, config: BenchConfig) -> int:
        """Return 1 if there is anything to measure."""
        return int(bool(_cases(config)))

    def run(self, config: BenchConfig, callback: Callback) -> Iterator[Result]:
        """Yield one table."""
        cases = _cases(config)
        if not cases:
            return
        shapes = config.models[0]
        callback.on_unit_start(f"host overhead with {shapes.title}'s number of tensors")
        flushed = _TOY_FLUSH_BYTES if config.toy else _FLUSH_BYTES
        rows = _rows(cases, shapes, flushed, config, callback)
        note = _NOTE.format(numel=NUMEL, flushed=f"{flushed >> 20} MiB", rounds=config.rounds)
        callback.on_unit_end()
        title = f"Host overhead: {shapes.title}, {len(shapes.tensors)} tensors"
        yield Result(self.name, title, _COLUMNS, rows, [note])


def _cases(config: BenchConfig) -> list[Case]:
    """Return each case once, in the order of the groups, without graphs, which have no host overhead."""
    cases = {case.key: case for group in config.groups if group.scope == "element" for case in group.cases}
    return [case for case in cases.values() if case.how != GRAPH]


def _rows(
    cases: list[Case], shapes: ModelShapes, flushed: int, config: BenchConfig, callback: Callback
) -> list[Row]:
    device = config.device
    tensors = [ParamShape(t.name, (NUMEL,)) for t in shapes.tensors]
    shared = SharedParams.create(tensors, device, config.dtype)
    memory = torch.zeros(flushed // 4, device=device)

    def flush_caches() -> None:
        memory.add_(1.0)
        shared.set_grads()

    timers: list[Timer] = []
    rows: list[Row] = []
    for case in cases:
        row: Row = {"key": case.key, "label": case.label, "source": case.source, "how": case.how}
        rows.append({**row, "tensors": len(shapes.tensors), "reason": ""})
        try:
            step = _warmed_up_step(case, shared)
        except Exception as error:
            rows[-1]["reason"] = error_line(error)
            continue
        timers += [
            Timer(case.key, step, shared.set_grads),
            Timer(case.key + _COLD, step, flush_caches),
        ]
    times = time_interleaved(timers, config.rounds, lambda: now(device), callback.on_progress)
    for row in rows:
        warm, cold = row["key"], row["key"] + _COLD
        if warm in times.seconds and cold in times.seconds:
            row |= {"warm_ms": times.median_ms(warm), "cold_ms": times.median_ms(cold)}
            row["per_tensor_us"] = 1e3 * row["cold_ms"] / row["tensors"]
        else:
            row["reason"] = row["reason"] or times.failed.get(warm) or times.failed.get(cold, "")
    return rows


def _warmed_up_step(case: Case, shared: SharedParams) -> Callable[[], object]:
    """Return the case's step after two calls, which create the state and compile."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        optimizer = case.make(shared.params)
        with require_compiled(case):
            for _ in range(2):
                shared.set_grads()
                optimizer.step()
    return optimizer.step
