"""The first compiled step: its time with a cold and a warm cache."""

from __future__ import annotations

from collections.abc import Iterator

from ..config import BenchConfig, log
from ..first_step import first_step_seconds
from ..results import Column, Result, Row, error_line

_COLUMNS = (
    Column("label", "optimizer"),
    Column("cold_seconds", "first step, cold, s", "seconds"),
    Column("warm_seconds", "first step, warm cache, s", "seconds"),
    Column("second_ms", "second step, ms", "ms"),
    Column("reason", ""),
)
FEW = ("lion", "adamw", "simba int16")
"""Labels measured by default: a small graph, a large one, and a slow one. Each needs several processes."""

_NOTE = (
    "Each first step runs in a new process, which imports torch and creates the tensors before the clock "
    "starts. Cold: TORCHINDUCTOR_CACHE_DIR is an empty directory. Warm: the same directory, another process."
)


def run(config: BenchConfig) -> Iterator[Result]:
    """Yield a table for the first model: all compiled element rules if full, otherwise those in `FEW`."""
    cases = [
        case
        for group in config.groups
        if group.scope == "element"
        for case in group.cases
        if case.ours and case.how == "compiled" and (config.full or case.label in FEW)
    ]
    shapes = config.models[0]
    rows: list[Row] = []
    for case in cases:
        log(f"first step: {case.label}")
        row: Row = {"key": case.key, "label": case.label, "model": shapes.name, "reason": ""}
        try:
            row |= first_step_seconds(case, shapes.name, config.device, config.dtype)
        except Exception as error:
            row["reason"] = error_line(error)
        rows.append(row)
    if rows:
        yield Result("first", f"The first step: {shapes.title}", _COLUMNS, rows, [_NOTE])
