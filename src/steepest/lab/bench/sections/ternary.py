"""Ternary layers beside dense ones; packing, unpacking and flipping beside axpy and a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from ...clock import now
from ..limits import AXPY, COPY
from ..results import Column, Result, Row
from ..section import Setting
from ..ternary import DENSE, LayerSize, Pass, layers, passes, passes_need
from ..turns import WARMUP_ROUNDS, Times, Turn, reason, take_turns
from ..watch import Watcher

SIZES = (LayerSize(1024, 64), LayerSize(1024, 256), LayerSize(1024, 1024), LayerSize(2048, 256))
WIDTH = 4096
TOY_SIZES = (LayerSize(32, 4), LayerSize(32, 16))
TOY_WIDTH = 64

_LAYER_COLUMNS = (
    Column("width", "in = out", "count"),
    Column("rows", "rows of input", "count"),
    Column("label", "layer"),
    Column("ms", "forward and backward, ms", "ms"),
    Column("times_dense", "× dense", "ratio"),
    Column("reason", ""),
)
_PASS_COLUMNS = (
    Column("label", "what"),
    Column("ms", "ms", "ms"),
    Column("ns_per_weight", "ns/weight", "rate"),
    Column("bytes_per_weight", "least B/weight", "rate"),
    Column("gigabytes_per_second", "GB/s", "rate"),
    Column("of_axpy", "of axpy", "percent"),
    Column("of_copy", "of the copy", "percent"),
    Column("reason", ""),
)
_LAYER_NOTE = (
    "Medians of {rounds} rounds in which all layers of a size take turns; × dense is the time over that of "
    "nn.Linear of the same shape in the same round. Gradients and votes are dropped between turns, untimed. "
    "Votes by magnitude are rounded eagerly, as by a trainer of fewer than 2²² weights."
)
_PASS_NOTE = (
    "Medians of {rounds} rounds in which all of these take turns. GB/s: the least bytes over the time; the "
    "shares are of the rate of axpy, and of a copy of one byte a weight, in the same rounds. A flip reads "
    "votes, reads and writes counters and packed weights; where at most 0.1 % may flip, five times as many "
    "have the votes. The flip step, a trainer's, gives back the memory of the votes besides. Unpacking makes "
    "new memory, of which the system gives a page at a time. What fits into a cache moves faster than memory "
    "does."
)

_Made = TypeVar("_Made")


class Ternary:
    """Two tables: layers of several sizes, and passes over the weights of a large one.

    Neither optimizers nor the models' shapes have a part in it; but where only toys are asked for, the
    sizes are toys too.
    """

    name = "ternary"

    def pieces(self, setting: Setting) -> int:
        """One a size of layer, and one for the passes."""
        return len(_sizes(setting)) + 1

    def run(self, setting: Setting, watcher: Watcher) -> Iterator[Result]:
        """Both tables."""
        rows: list[Row] = []
        notes = [_LAYER_NOTE.format(rounds=setting.rounds)]
        title = "Ternary layers beside nn.Linear"
        try:
            for size in _sizes(setting):
                watcher.begun(f"ternary layers: {size.width} × {size.width}, {size.rows} rows")
                short = _short(size.need(setting.dtype), setting)
                if short:
                    notes.append(f"{size.width} × {size.width}, {size.rows} rows: {short}")
                else:
                    rows += _layer_rows(size, setting, watcher)
                watcher.finished()
        except KeyboardInterrupt:
            yield Result(self.name, title, _LAYER_COLUMNS, rows, notes)
            raise
        yield Result(self.name, title, _LAYER_COLUMNS, rows, notes)

        width = TOY_WIDTH if setting.toy else WIDTH
        watcher.begun(f"ternary weights: packing and flipping {width} × {width}")
        short = _short(passes_need(width, setting.dtype), setting)
        rows = [] if short else _pass_rows(width, setting, watcher)
        watcher.finished()
        notes = [short] if short else [_PASS_NOTE.format(rounds=setting.rounds)]
        yield Result(self.name, f"Passes over {width} × {width} ternary weights", _PASS_COLUMNS, rows, notes)


def _sizes(setting: Setting) -> tuple[LayerSize, ...]:
    return TOY_SIZES if setting.toy else SIZES


def _short(need: int, setting: Setting) -> str:
    if need <= setting.memory:
        return ""
    return f"skipped: needs {need / 2**30:.1f} GiB, the limit is {setting.memory / 2**30:.1f} GiB"


def _layer_rows(size: LayerSize, setting: Setting, watcher: Watcher) -> list[Row]:
    makers = layers(size, setting.device, setting.dtype)
    turns, failed = _made(makers)
    times = _timed(list(turns.values()), setting, watcher)
    failed |= times.failed
    rows: list[Row] = []
    for label in makers:
        row: Row = {
            "key": f"{size.width}/{size.rows}:{label}",
            "width": size.width,
            "rows": size.rows,
            "label": label,
            **_outcome(label, times, failed),
        }
        if label in times.seconds:
            row["times_dense"] = _ratio(times, label, DENSE)
        rows.append(row)
    return rows


def _pass_rows(width: int, setting: Setting, watcher: Watcher) -> list[Row]:
    makers = passes(width, setting.device, setting.dtype)
    made, failed = _made(makers)
    times = _timed([each.turn for each in made.values()], setting, watcher)
    failed |= times.failed
    weights = width * width
    rows: list[Row] = []
    for label in makers:
        row: Row = {"key": label, "label": label, "weights": weights, **_outcome(label, times, failed)}
        if label in times.seconds:
            nbytes = made[label].nbytes
            row |= {
                "ns_per_weight": 1e6 * row["ms"] / weights,
                "least_bytes": nbytes,
                "bytes_per_weight": nbytes / weights,
                "gigabytes_per_second": nbytes / row["ms"] / 1e6,
                "of_axpy": _share(times, made, label, AXPY),
                "of_copy": _share(times, made, label, COPY),
            }
        rows.append(row)
    return rows


def _made(makers: Mapping[str, Callable[[], _Made]]) -> tuple[dict[str, _Made], dict[str, str]]:
    """(what could be made, reasons why the rest could not)."""
    made: dict[str, _Made] = {}
    failed: dict[str, str] = {}
    for label, make in makers.items():
        try:
            made[label] = make()
        except Exception as error:
            failed[label] = reason(error)
    return made, failed


def _timed(turns: list[Turn], setting: Setting, watcher: Watcher) -> Times:
    total = setting.rounds + WARMUP_ROUNDS
    return take_turns(
        turns,
        setting.rounds,
        lambda: now(setting.device),
        lambda done: watcher.ticked(done / total),
    )


def _outcome(label: str, times: Times, failed: Mapping[str, str]) -> dict[str, Any]:
    if label not in times.seconds:
        return {"status": "failed", "reason": failed[label]}
    return {
        "status": "ok",
        "reason": "",
        "ms": times.median_ms(label),
        "quartiles_ms": times.quartiles_ms(label),
        "rounds": len(times.seconds[label]),
    }


def _ratio(times: Times, label: str, other: str) -> float | None:
    return times.ratio(label, other) if {label, other} <= times.seconds.keys() else None


def _share(times: Times, made: Mapping[str, Pass], label: str, other: str) -> float | None:
    """This one's rate over the other's."""
    faster = _ratio(times, other, label)
    return None if faster is None else faster * made[label].nbytes / made[other].nbytes
