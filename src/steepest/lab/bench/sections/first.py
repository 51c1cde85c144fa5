"""The first compiled step: its time with a cold and a warm cache, and later recompilations."""

from __future__ import annotations

from collections.abc import Iterator

from ..callbacks import Callback
from ..case import Case
from ..first_step import first_step_seconds
from ..interleaved import error_line
from ..recompiles import STEPS, recompilations
from ..results import Column, Result, Row
from ..section import BenchConfig

_COLUMNS = (
    Column("label", "optimizer"),
    Column("cold_seconds", "first step, cold, s", "seconds"),
    Column("warm_seconds", "first step, warm cache, s", "seconds"),
    Column("second_ms", "second step, ms", "ms"),
    Column("recompilations", f"recompilations in {STEPS} steps", "count"),
    Column("reason", ""),
)
FEW = ("lion", "adamw", "simba int16")
"""Labels measured by default: a small graph, a large one, and a slow one. Each needs several processes."""

_NOTES = [
    "First steps: each runs in a new process, which imports torch and creates the tensors before the clock "
    "starts. Cold: TORCHINDUCTOR_CACHE_DIR is an empty directory. Warm: the same directory, another process.",
    f"Recompilations: graphs compiled in {STEPS} steps of a warm-up and cosine schedule of learning rate, "
    "weight decay and momentum, without those of the first step. The tensors are small, because sizes do "
    "not matter here.",
    "If compilation fails, the last column shows the error.",
]


class First:
    """A table for the first model: all compiled element rules with --full, otherwise those in `FEW`."""

    name = "first"

    def work_units(self, config: BenchConfig) -> int:
        """Return the number of optimizers."""
        return len(_compiled(config))

    def run(self, config: BenchConfig, callback: Callback) -> Iterator[Result]:
        """Yield one table."""
        cases = _compiled(config)
        if not cases:
            return
        omitted = ["--full measures the first steps of all compiled element rules."] * (not config.full)
        notes = _NOTES + omitted
        shapes = config.models[0]
        rows: list[Row] = []
        title = f"The first step: {shapes.title}"
        try:
            for case in cases:
                callback.on_unit_start(f"first step: {case.label}")
                row: Row = {"key": case.key, "label": case.label, "model": shapes.name, "reason": ""}
                try:
                    row |= first_step_seconds(case, shapes.name, config.device, config.dtype)
                    callback.on_progress(0.8)
                    row["recompilations"] = recompilations(case, config.device)
                except Exception as error:
                    row["reason"] = error_line(error)
                rows.append(row)
                callback.on_unit_end()
        except KeyboardInterrupt:
            yield Result(self.name, title, _COLUMNS, rows, notes)
            raise
        yield Result(self.name, title, _COLUMNS, rows, notes)


def _compiled(config: BenchConfig) -> list[Case]:
    return [
        case
        for group in config.groups
        if group.scope == "element"
        for case in group.cases
        if case.ours and case.how == "compiled" and (config.full or case.label in FEW)
    ]
