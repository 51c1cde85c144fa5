"""What a step costs before it moves anything: as many tensors as a model has, of next to no size."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator

import torch

from ...clock import now
from ..entry import GRAPH, Entry
from ..graphs import really_compiled
from ..material import Material
from ..results import Column, Result, Row
from ..section import Setting
from ..shapes import ShapeList, Tensor
from ..turns import Turn, reason, take_turns
from ..watch import Watcher

NUMEL = 64
"""Elements of each tensor: what a few cache lines hold."""

# More than the last-level cache of any processor in use, but a small part of a model.
_SWEPT_BYTES, _SWEPT_BYTES_OF_TOYS = 1 << 29, 1 << 20
_AFTER = " after memory"

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
    "A step over as many tensors as the model has, of {numel} elements each: nearly all of it is what the "
    "host does. Warm: one step after the other. After memory: before each step, untimed, {swept} are read "
    "and written, as a training step does, and the host's own data is no longer in the caches. Medians of "
    "{rounds} rounds in which all take turns."
)


class Host:
    """A table for the first model, of its element families."""

    name = "host"

    def pieces(self, setting: Setting) -> int:
        """One."""
        return int(bool(_entries(setting)))

    def run(self, setting: Setting, watcher: Watcher) -> Iterator[Result]:
        """One table."""
        entries = _entries(setting)
        if not entries:
            return
        shapes = setting.models[0]
        watcher.begun(f"the host, at {shapes.title}'s number of tensors")
        swept = _SWEPT_BYTES_OF_TOYS if setting.toy else _SWEPT_BYTES
        rows = _rows(entries, shapes, swept, setting, watcher)
        note = _NOTE.format(numel=NUMEL, swept=f"{swept >> 20} MiB", rounds=setting.rounds)
        watcher.finished()
        yield Result(
            self.name, f"The host: {shapes.title}, {len(shapes.tensors)} tensors", _COLUMNS, rows, [note]
        )


def _entries(setting: Setting) -> list[Entry]:
    """Everyone once, in the order of the families; a graph has no host's part."""
    found = {e.key: e for family in setting.families if family.scope == "element" for e in family.entries}
    return [entry for entry in found.values() if entry.how != GRAPH]


def _rows(
    entries: list[Entry], shapes: ShapeList, swept: int, setting: Setting, watcher: Watcher
) -> list[Row]:
    device = setting.device
    material = Material.of([Tensor(t.name, (NUMEL,)) for t in shapes.tensors], device, setting.dtype)
    memory = torch.zeros(swept // 4, device=device)

    def after_memory() -> None:
        memory.add_(1.0)
        material.lend_gradients()

    turns: list[Turn] = []
    rows: list[Row] = []
    for entry in entries:
        row: Row = {"key": entry.key, "label": entry.label, "source": entry.source, "how": entry.how}
        rows.append({**row, "tensors": len(shapes.tensors), "reason": ""})
        try:
            step = _prepared(entry, material)
        except Exception as error:
            rows[-1]["reason"] = reason(error)
            continue
        turns += [
            Turn(entry.key, step, material.lend_gradients),
            Turn(entry.key + _AFTER, step, after_memory),
        ]
    total = setting.rounds + 2
    times = take_turns(turns, setting.rounds, lambda: now(device), lambda done: watcher.ticked(done / total))
    for row in rows:
        warm, cold = row["key"], row["key"] + _AFTER
        if warm in times.seconds and cold in times.seconds:
            row |= {"warm_ms": times.median_ms(warm), "cold_ms": times.median_ms(cold)}
            row["per_tensor_us"] = 1e3 * row["cold_ms"] / row["tensors"]
        else:
            row["reason"] = row["reason"] or times.failed.get(warm) or times.failed.get(cold, "")
    return rows


def _prepared(entry: Entry, material: Material) -> Callable[[], object]:
    """Its step, taken twice: state is made and code compiled."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        optimizer = entry.make(material.params)
        with really_compiled(entry):
            for _ in range(2):
                material.lend_gradients()
                optimizer.step()
    return optimizer.step
