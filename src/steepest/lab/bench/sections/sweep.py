"""A few optimizers over all model sizes, for the picture."""

from __future__ import annotations

from collections.abc import Iterator

from ..duel import duel
from ..entry import Entry
from ..families import Family
from ..results import Column, Result, Row
from ..section import Setting
from ..shapes import SHAPE_LISTS, TOYS
from ..watch import Watcher

NAMES = ("signgsd", "lion", "adamw")
_PEER = ("adamw", "fused")
_LARGEST = list(SHAPE_LISTS)[-1]

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
    "All tensors of each model. What does not fit into the memory limit is planned: its state is counted on "
    "the meta device, and its step is not timed; neither is that of the largest model without --full."
)


class Sweep:
    """Step time and state against model size, of the largest model only the state unless in full."""

    name = "sweep"

    def pieces(self, setting: Setting) -> int:
        """One a model."""
        return len(_models(setting)) if _entries(setting) else 0

    def run(self, setting: Setting, watcher: Watcher) -> Iterator[Result]:
        """One table."""
        entries = _entries(setting)
        if not entries:
            return
        rows: list[Row] = []
        try:
            for name in _models(setting):
                shapes = SHAPE_LISTS[name]()
                watcher.begun(f"sizes: {shapes.title}")
                family = Family("sweep", "element", "all", entries)
                why = "not timed without --full" if name == _LARGEST and not setting.full else ""
                rows += duel(family, shapes, setting, watcher.ticked, untimed=why)
                watcher.finished()
        except KeyboardInterrupt:
            yield Result(self.name, "Model sizes", _COLUMNS, rows, [_NOTE])
            raise
        yield Result(self.name, "Model sizes", _COLUMNS, rows, [_NOTE])


def _models(setting: Setting) -> list[str]:
    """All sizes, unless it is a toy that is asked for."""
    if setting.toy:
        return [shapes.name for shapes in setting.models]
    return [name for name in SHAPE_LISTS if name not in TOYS]


def _entries(setting: Setting) -> tuple[Entry, ...]:
    """Ours once each, compiled if compiled ones are measured, and torch's fused AdamW."""
    found: dict[str, Entry] = {}
    for family in setting.families:
        for entry in family.entries:
            if entry.ours and entry.rule in NAMES:
                found.setdefault(entry.rule, entry)
            elif (entry.rule, entry.how) == _PEER:
                found[entry.key] = entry
    return tuple(found.values())
