"""Every optimizer's step beside its peers', held against what the step cannot do without."""

from __future__ import annotations

from collections.abc import Iterator

from ..duel import duel
from ..families import Family
from ..observe import MEMORY_IS_KNOWN_BY
from ..peers import PEERS, REPEATED
from ..results import Column, Result, Row
from ..section import Setting
from ..shapes import ShapeList
from ..watch import Watcher

_ALWAYS = (
    Column("label", "optimizer"),
    Column("source", "from"),
    Column("how", "how"),
    Column("step_ms", "step, ms", "ms"),
    Column("times_ours", "× ours", "ratio"),
)
_BYTES = (Column("least_per_parameter", "least B/param", "ms", wide=True),)
_FLOPS = (Column("gflop", "Gflop", "ms", wide=True),)
_LIMIT = (
    Column("limit_ms", "limit, ms", "ms", wide=True),
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
_WHY = (Column("reason", ""),)


# Said in a note rather than in a row of blanks.
_ABSENT = ("not installed", "eager only")


class Steps:
    """A table a model for the element rules, and one for the matrix rules."""

    name = "steps"

    def pieces(self, setting: Setting) -> int:
        """One a family and model."""
        return len(setting.models) * len(setting.families)

    def run(self, setting: Setting, watcher: Watcher) -> Iterator[Result]:
        """The tables, each when it stands."""
        for shapes in setting.models:
            for scope in ("element", "matrix"):
                for where in ("all", "hidden", "attention"):
                    chosen = [f for f in setting.families if f.scope == scope and f.where == where]
                    if chosen:
                        yield from self._tables(shapes, chosen, setting, watcher)

    def _tables(
        self, shapes: ShapeList, families: list[Family], setting: Setting, watcher: Watcher
    ) -> Iterator[Result]:
        rows: list[Row] = []
        try:
            for family in families:
                watcher.begun(f"{shapes.title}: {family.name}")
                rows += duel(family, shapes, setting, watcher.ticked)
                watcher.finished()
        except KeyboardInterrupt:
            yield self._table(rows, shapes, families, setting)
            raise
        yield self._table(rows, shapes, families, setting)

    def _table(self, found: list[Row], shapes: ShapeList, families: list[Family], setting: Setting) -> Result:
        first, on_cuda = families[0], setting.device.type == "cuda"
        flops = [row.get("flops") for row in found]
        found = [{**row, "gflop": f / 1e9 if f else None} for row, f in zip(found, flops, strict=True)]
        rows = [row for row in found if row["status"] not in _ABSENT]
        absent = [row for row in found if row["status"] in _ABSENT]
        tensors = first.tensors(shapes, setting.blocks)
        count = sum(tensor.numel for tensor in tensors)
        kind = "Element rules" if first.scope == "element" else "Matrix rules"
        title = f"{kind}: {shapes.title}, {_which(first, shapes, setting)}, {count:,} parameters"
        columns: tuple[Column, ...] = _ALWAYS
        if first.scope == "element":
            # Copy's bandwidth is what is asked of steps on CUDA; on a CPU axpy is the measure.
            columns += (*_BYTES, *_LIMIT, Column("of_copy", "of copy", "percent", wide=not on_cuda))
        else:
            columns += _FLOPS + _LIMIT
        columns += _LAST + (_ON_CUDA if on_cuda else ()) + _WHY
        notes = _notes(first, setting) + _left_out(families, setting) + _absences(absent)
        return Result(self.name, title, columns, rows, notes)


def _left_out(families: list[Family], setting: Setting) -> list[str]:
    """A line for the peers that are measured in full only."""
    faced = {family.name for family in families if any(not entry.ours for entry in family.entries)}
    left = (e for name in faced for e in PEERS.get(name, ()) if (name, e.label) in REPEATED)
    names = sorted(f"{entry.source}'s {entry.label}" for entry in left)
    if setting.full or not names:
        return []
    return [f"Left out without --full, since they compile for half a minute: {', '.join(names)}."]


def _absences(rows: list[Row]) -> list[str]:
    """A line for what is not installed and one for what has no compiled step."""
    missing = ", ".join(dict.fromkeys(row["source"] for row in rows if row["status"] == "not installed"))
    eager = ", ".join(dict.fromkeys(row["label"] for row in rows if row["status"] == "eager only"))
    return [f"Not installed: {missing}."] * bool(missing) + [
        f"Told to compile, these run eagerly all the same and are shown so: {eager}."
    ] * bool(eager)


def _which(family: Family, shapes: ShapeList, setting: Setting) -> str:
    tensors = family.tensors(shapes, setting.blocks)
    if family.where == "all":
        return f"all {len(tensors)} tensors"
    of = f"of all {shapes.blocks} blocks"
    if setting.blocks is not None and setting.blocks < shapes.blocks:
        of = f"of {setting.blocks} of {shapes.blocks} blocks"
    return f"{len(tensors)} {'attention' if family.where == 'attention' else 'hidden'} matrices {of}"


def _notes(family: Family, setting: Setting) -> list[str]:
    notes = [
        f"Medians of {setting.rounds} rounds in which the contestants of a family and axpy over the same "
        "tensors take turns, on shared parameters and gradients; ratios are medians of each round's own. "
        "Each family begins with its own axpy.",
        f"Temporary: {MEMORY_IS_KNOWN_BY.get(setting.device.type, 'not known on this device')}.",
    ]
    if setting.device.type == "cuda":
        notes.append(
            "Kernels and the device's time are those of one profiled step: one that takes longer waits for "
            "the host. graph: made with capturable=True and a learning rate on the device, compiled where "
            "there is a compiled step, captured in a CUDA graph and replayed; what it allocates stays in the "
            "graph's own memory. CUDA graph: whether a peer's step can be captured."
        )
    if family.scope == "element":
        return [
            "Limit: the least bytes (parameters read and written, gradients read, state read and written) at "
            "the rate of the family's axpy. A peer is held to the state that ours keeps. Of copy: the "
            "least bytes over the time, as a share of the rate of p ← g over the same tensors in the same "
            "rounds.",
            *notes,
        ]
    return [
        "Limit: the matrix products that the step itself computes, each shape timed alone in the same "
        "rounds and counted as often as the step computes it; fewer products are a lower limit, so compare "
        "steps by their time. Products inside a compiler's kernels are not seen: there the bytes are the "
        "limit.",
        *notes,
    ]
