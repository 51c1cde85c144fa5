"""The first compiled step: seconds with an empty cache and with a full one; and what recompiles later."""

from __future__ import annotations

from collections.abc import Iterator

from ..entry import Entry
from ..first_step import first_step_seconds
from ..recompiles import STEPS, recompilations
from ..results import Column, Result, Row
from ..section import Setting
from ..turns import reason
from ..watch import Watcher

_COLUMNS = (
    Column("label", "optimizer"),
    Column("cold_seconds", "first step, cold, s", "seconds"),
    Column("warm_seconds", "first step, warm cache, s", "seconds"),
    Column("second_ms", "second step, ms", "ms"),
    Column("recompilations", f"recompilations in {STEPS} steps", "count"),
    Column("reason", ""),
)
FEW = ("lion", "adamw", "simba int16")
"""Labels: a small graph, a large one, and the one that has taken longest. Each is three processes' work."""

_NOTES = [
    "First steps: each in a process of its own that has imported torch and made the tensors before the clock "
    "starts. Cold: TORCHINDUCTOR_CACHE_DIR is a new, empty folder. Warm: the same folder, another process.",
    f"Recompilations: graphs that torch.compile makes in {STEPS} steps of a warm-up and cosine schedule in "
    "which learning rate, weight decay and momentum all change, those of the first step not counted; on "
    "tensors of toy size, since sizes have no part in it.",
    "A step that was not compiled, since that failed, has a reason instead of its number.",
]


class First:
    """A table for the first model: of every compiled element rule in full, otherwise of `FEW` of them."""

    name = "first"

    def pieces(self, setting: Setting) -> int:
        """One an optimizer."""
        return len(_compiled(setting))

    def run(self, setting: Setting, watcher: Watcher) -> Iterator[Result]:
        """One table."""
        entries = _compiled(setting)
        if not entries:
            return
        left_out = ["--full measures the first steps of all compiled element rules."] * (not setting.full)
        notes = _NOTES + left_out
        shapes = setting.models[0]
        rows: list[Row] = []
        title = f"The first step: {shapes.title}"
        try:
            for entry in entries:
                watcher.begun(f"first step: {entry.label}")
                row: Row = {"key": entry.key, "label": entry.label, "model": shapes.name, "reason": ""}
                try:
                    row |= first_step_seconds(entry, shapes.name, setting.device, setting.dtype)
                    watcher.ticked(0.8)
                    row["recompilations"] = recompilations(entry, setting.device)
                except Exception as error:
                    row["reason"] = reason(error)
                rows.append(row)
                watcher.finished()
        except KeyboardInterrupt:
            yield Result(self.name, title, _COLUMNS, rows, notes)
            raise
        yield Result(self.name, title, _COLUMNS, rows, notes)


def _compiled(setting: Setting) -> list[Entry]:
    return [
        entry
        for family in setting.families
        if family.scope == "element"
        for entry in family.entries
        if entry.ours and entry.how == "compiled" and (setting.full or entry.label in FEW)
    ]
