"""Ternary layers compared with dense ones; packing, unpacking and flipping compared with axpy and a copy."""

from __future__ import annotations

from collections.abc import Iterator

from ..bandwidth import AXPY, COPY
from ..config import BenchConfig, log
from ..results import Column, Result, Row, timed
from ..ternary_timers import DENSE, LayerSize, layers, passes

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
)
_PASS_COLUMNS = (
    Column("label", "operation"),
    Column("ms", "ms", "ms"),
    Column("ns_per_weight", "ns/weight", "rate"),
    Column("bytes_per_weight", "least B/weight", "rate"),
    Column("gigabytes_per_second", "GB/s", "rate"),
    Column("of_axpy", "of axpy", "percent"),
    Column("of_copy", "of the copy", "percent"),
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


def run(config: BenchConfig) -> Iterator[Result]:
    """Yield two tables: layers of several sizes, and passes over the weights of a large layer.

    The section ignores optimizers and the models' shapes, but if all models are toys, so are its sizes.
    """
    rows: list[Row] = []
    for size in TOY_SIZES if config.toy else SIZES:
        log(f"ternary layers: {size.width} × {size.width}, {size.rows} rows")
        timers = layers(size, config.device, config.dtype)
        times = config.time({k: t.run for k, t in timers.items()}, {k: t.setup for k, t in timers.items()})
        rows += [
            {
                "width": size.width,
                "rows": size.rows,
                "label": label,
                **timed(timing),
                "times_dense": timing.ratio(times[DENSE]),
            }
            for label, timing in times.items()
        ]
    note = _LAYER_NOTE.format(rounds=config.rounds)
    yield Result("ternary", "Ternary layers compared with nn.Linear", _LAYER_COLUMNS, rows, [note])

    width = TOY_WIDTH if config.toy else WIDTH
    log(f"ternary weights: packing and flipping {width} × {width}")
    rows = _pass_rows(width, config)
    note = _PASS_NOTE.format(rounds=config.rounds)
    yield Result("ternary", f"Passes over {width} × {width} ternary weights", _PASS_COLUMNS, rows, [note])


def _pass_rows(width: int, config: BenchConfig) -> list[Row]:
    compiled = any(case.how == "compiled" for group in config.groups for case in group.cases)
    made = passes(width, config.device, config.dtype, compiled=compiled)
    times = config.time(
        {label: each.timer.run for label, each in made.items()},
        {label: each.timer.setup for label, each in made.items()},
    )

    def relative_rate(label: str, other: str) -> float:
        return times[other].ratio(times[label]) * made[label].nbytes / made[other].nbytes

    return [
        {
            "label": label,
            **timed(timing),
            "ns_per_weight": 1e6 * timing.median_ms / width**2,
            "bytes_per_weight": made[label].nbytes / width**2,
            "gigabytes_per_second": made[label].nbytes / timing.median_ms / 1e6,
            "of_axpy": relative_rate(label, AXPY),
            "of_copy": relative_rate(label, COPY),
        }
        for label, timing in times.items()
    ]
