"""A sweep over model sizes with a few optimizers, for the plot."""

from __future__ import annotations

from collections.abc import Iterator

from ..callbacks import Callback
from ..case import Case
from ..compare import compare
from ..groups import Group
from ..results import Column, Result, Row
from ..section import BenchConfig
from ..shapes import MODELS, TOY_MODELS

NAMES = ("signgsd", "lion", "adamw")
_PEER = ("adamw", "fused")
_LARGEST = list(MODELS)[-1]

_COLUMNS = (
    Column("model", "model"),
    Column("parameters", "parameters", "count"),
    Column("label", "optimizer"),
    Column("source", "from"),
    Column("how", "how"),
    Column("step_ms", "step, ms", "ms"),
    Column("of_limit", "of the limit", "percent"),
    Column("state_bytes", "state", "bytes"),
    Column("reason", ""),
)
_NOTE = (
    "All tensors of each model. Models that exceed the memory limit are planned: their state is counted on "
    "the meta device, and their steps are not timed. The largest model's steps are timed only with --full."
)


class Sweep:
    """Step time and state over model size; the largest model's steps are timed only with --full."""

    name = "sweep"

    def work_units(self, config: BenchConfig) -> int:
        """Return the number of models."""
        return len(_models(config)) if _cases(config) else 0

    def run(self, config: BenchConfig, callback: Callback) -> Iterator[Result]:
        """Yield one table."""
        cases = _cases(config)
        if not cases:
            return
        rows: list[Row] = []
        try:
            for name in _models(config):
                shapes = MODELS[name]()
                callback.on_unit_start(f"sizes: {shapes.title}")
                group = Group("sweep", "element", "all", cases)
                reason = "not timed without --full" if name == _LARGEST and not config.full else ""
                rows += compare(group, shapes, config, callback.on_progress, untimed=reason)
                callback.on_unit_end()
        except KeyboardInterrupt:
            yield Result(self.name, "Model sizes", _COLUMNS, rows, [_NOTE])
            raise
        yield Result(self.name, "Model sizes", _COLUMNS, rows, [_NOTE])


def _models(config: BenchConfig) -> list[str]:
    """Return the names of all models; of the selected ones if they are toys."""
    if config.toy:
        return [shapes.name for shapes in config.models]
    return [name for name in MODELS if name not in TOY_MODELS]


def _cases(config: BenchConfig) -> tuple[Case, ...]:
    """Return steepest's optimizers, each once, compiled if selected, and torch's fused AdamW."""
    cases: dict[str, Case] = {}
    for group in config.groups:
        for case in group.cases:
            if case.ours and case.rule in NAMES:
                cases.setdefault(case.rule, case)
            elif (case.rule, case.how) == _PEER:
                cases[case.key] = case
    return tuple(cases.values())
