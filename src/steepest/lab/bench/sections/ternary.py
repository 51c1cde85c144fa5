"""Ternary layers compared with dense ones; packing, unpacking and flipping compared with axpy and a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from ...clock import now
from ..bandwidth import AXPY, COPY
from ..callbacks import Callback
from ..interleaved import Measurements, Timer, error_line, time_interleaved
from ..results import Column, Result, Row
from ..section import BenchConfig
from ..ternary import DENSE, LayerSize, Pass, estimated_pass_bytes, layers, passes

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
    Column("label", "operation"),
    Column("ms", "ms", "ms"),
    Column("ns_per_weight", "ns/weight", "rate"),
    Column("bytes_per_weight", "least B/weight", "rate"),
    Column("gigabytes_per_second", "GB/s", "rate"),
    Column("of_axpy", "of axpy", "percent"),
    Column("of_copy", "of the copy", "percent"),
    Column("reason", ""),
)
_LAYER_NOTE = (
    "Medians of {rounds} interleaved rounds of all layers of a size; × dense is the time divided by that of "
    "nn.Linear of the same shape in the same round. Gradients and votes are cleared before each run, "
    "untimed. Votes by magnitude are rounded in eager mode, as by a trainer of fewer than 2²² weights."
)
_PASS_NOTE = (
    "Medians of {rounds} interleaved rounds. GB/s: the least bytes divided by the time; the percentages are "
    "relative to the rates of axpy and of a copy of one byte per weight in the same rounds. A flip reads "
    "votes, and reads and writes counters and packed weights. With at most 0.1 % flips, five times as many "
    "weights have enough votes. The flip step, of a trainer, also frees the memory of the votes. Unpacking "
    "allocates memory, which the system provides page by page. Data that fits into a cache moves faster than "
    "memory allows."
)

_Made = TypeVar("_Made")


class Ternary:
    """Two tables: layers of several sizes, and passes over the weights of a large layer.

    The section ignores optimizers and the models' shapes, but if all models are toys, so are its sizes.
    """

    name = "ternary"

    def work_units(self, config: BenchConfig) -> int:
        """Return the number of layer sizes plus one for the passes."""
        return len(_sizes(config)) + 1

    def run(self, config: BenchConfig, callback: Callback) -> Iterator[Result]:
        """Yield both tables."""
        rows: list[Row] = []
        notes = [_LAYER_NOTE.format(rounds=config.rounds)]
        title = "Ternary layers compared with nn.Linear"
        try:
            for size in _sizes(config):
                callback.on_unit_start(f"ternary layers: {size.width} × {size.width}, {size.rows} rows")
                skipped = _memory_shortage(size.estimated_bytes(config.dtype), config)
                if skipped:
                    notes.append(f"{size.width} × {size.width}, {size.rows} rows: {skipped}")
                else:
                    rows += _layer_rows(size, config, callback)
                callback.on_unit_end()
        except KeyboardInterrupt:
            yield Result(self.name, title, _LAYER_COLUMNS, rows, notes)
            raise
        yield Result(self.name, title, _LAYER_COLUMNS, rows, notes)

        width = TOY_WIDTH if config.toy else WIDTH
        callback.on_unit_start(f"ternary weights: packing and flipping {width} × {width}")
        skipped = _memory_shortage(estimated_pass_bytes(width, config.dtype), config)
        rows = [] if skipped else _pass_rows(width, config, callback)
        callback.on_unit_end()
        notes = [skipped] if skipped else [_PASS_NOTE.format(rounds=config.rounds)]
        yield Result(self.name, f"Passes over {width} × {width} ternary weights", _PASS_COLUMNS, rows, notes)


def _sizes(config: BenchConfig) -> tuple[LayerSize, ...]:
    return TOY_SIZES if config.toy else SIZES


def _memory_shortage(need: int, config: BenchConfig) -> str:
    """Return a note if a measurement exceeds the memory limit, otherwise an empty string."""
    if need <= config.memory:
        return ""
    return f"skipped: needs {need / 2**30:.1f} GiB, the limit is {config.memory / 2**30:.1f} GiB"


def _layer_rows(size: LayerSize, config: BenchConfig, callback: Callback) -> list[Row]:
    makers = layers(size, config.device, config.dtype)
    timers, failed = _make_all(makers)
    times = _time(list(timers.values()), config, callback)
    failed |= times.failed
    rows: list[Row] = []
    for label in makers:
        row: Row = {
            "key": f"{size.width}/{size.rows}:{label}",
            "width": size.width,
            "rows": size.rows,
            "label": label,
            **_timing_columns(label, times, failed),
        }
        if label in times.seconds:
            row["times_dense"] = _ratio(times, label, DENSE)
        rows.append(row)
    return rows


def _pass_rows(width: int, config: BenchConfig, callback: Callback) -> list[Row]:
    makers = passes(width, config.device, config.dtype)
    made, failed = _make_all(makers)
    times = _time([each.timer for each in made.values()], config, callback)
    failed |= times.failed
    weights = width * width
    rows: list[Row] = []
    for label in makers:
        row: Row = {"key": label, "label": label, "weights": weights, **_timing_columns(label, times, failed)}
        if label in times.seconds:
            nbytes = made[label].nbytes
            row |= {
                "ns_per_weight": 1e6 * row["ms"] / weights,
                "least_bytes": nbytes,
                "bytes_per_weight": nbytes / weights,
                "gigabytes_per_second": nbytes / row["ms"] / 1e6,
                "of_axpy": _relative_rate(times, made, label, AXPY),
                "of_copy": _relative_rate(times, made, label, COPY),
            }
        rows.append(row)
    return rows


def _make_all(makers: Mapping[str, Callable[[], _Made]]) -> tuple[dict[str, _Made], dict[str, str]]:
    """Call all makers; return their results and the errors of those that failed."""
    made: dict[str, _Made] = {}
    failed: dict[str, str] = {}
    for label, make in makers.items():
        try:
            made[label] = make()
        except Exception as error:
            failed[label] = error_line(error)
    return made, failed


def _time(timers: list[Timer], config: BenchConfig, callback: Callback) -> Measurements:
    return time_interleaved(timers, config.rounds, lambda: now(config.device), callback.on_progress)


def _timing_columns(label: str, times: Measurements, failed: Mapping[str, str]) -> dict[str, Any]:
    if label not in times.seconds:
        return {"status": "failed", "reason": failed[label]}
    return {
        "status": "ok",
        "reason": "",
        "ms": times.median_ms(label),
        "quartiles_ms": times.quartiles_ms(label),
        "rounds": len(times.seconds[label]),
    }


def _ratio(times: Measurements, label: str, other: str) -> float | None:
    return times.ratio(label, other) if {label, other} <= times.seconds.keys() else None


def _relative_rate(times: Measurements, made: Mapping[str, Pass], label: str, other: str) -> float | None:
    """Return the rate of one pass divided by that of another."""
    speedup = _ratio(times, other, label)
    return None if speedup is None else speedup * made[label].nbytes / made[other].nbytes
