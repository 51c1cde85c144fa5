"""The machine's memory bandwidth over the model's tensors and flops of products with the model's shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...clock import now
from ..bandwidth import AXPY, COPY, axpy, axpy_bytes, copy, copy_bytes
from ..callbacks import Callback
from ..interleaved import Timer, time_interleaved
from ..params import SharedParams
from ..products import Product
from ..results import Column, Result, Row
from ..section import BenchConfig
from ..shapes import ModelShapes

_COLUMNS = (
    Column("what", "operation"),
    Column("ms", "ms", "ms"),
    Column("rate", "rate", "rate"),
    Column("unit", ""),
)
_NOTE = (
    "Medians of {rounds} interleaved rounds. axpy is p + a·g over all of the model's tensors, which moves 12 "
    "bytes per float32 parameter; the steps below are compared with it. copy moves 8 bytes. Reads that the "
    "hardware does before a write are not counted."
)


class Machine:
    """Memory bandwidth over the model's tensors, and matrix products in float32 and bfloat16."""

    name = "machine"

    def work_units(self, config: BenchConfig) -> int:
        """Return the number of models."""
        return len(config.models)

    def run(self, config: BenchConfig, callback: Callback) -> Iterator[Result]:
        """Yield a table per model."""
        for shapes in config.models:
            callback.on_unit_start(f"the machine with {shapes.title}'s shapes")
            result = self._measure(shapes, config, callback)
            callback.on_unit_end()
            yield result

    def _measure(self, shapes: ModelShapes, config: BenchConfig, callback: Callback) -> Result:
        title = f"The machine with {shapes.title}'s shapes"
        nbytes = config.dtype.itemsize * shapes.numel
        if 2 * nbytes > config.memory:
            note = f"skipped: parameters and gradients need {2 * nbytes / 2**30:.1f} GiB, the limit is "
            return Result(self.name, title, _COLUMNS, [], [f"{note}{config.memory / 2**30:.1f} GiB"])
        device = config.device
        shared = SharedParams.create(shapes.tensors, device, config.dtype)
        moved = {AXPY: axpy_bytes(shared), COPY: copy_bytes(shared)}
        products = list(
            dict.fromkeys(p for dtype in (torch.float32, torch.bfloat16) for p in _products(shapes, dtype))
        )
        functions: dict[str, Callable[[], object]] = {
            AXPY: lambda: axpy(shared),
            COPY: lambda: copy(shared),
        }
        functions |= {str(product): product.runner(device) for product in products}
        timers = [Timer(label, run, queued=device.type != "cpu") for label, run in functions.items()]
        times = time_interleaved(timers, config.rounds, lambda: now(device), callback.on_progress)
        rows: list[Row] = []
        for label in times.seconds:
            milliseconds = times.median_ms(label)
            row: Row = {"what": label, "ms": milliseconds, "quartiles_ms": times.quartiles_ms(label)}
            if label in moved:
                row |= {"rate": moved[label] / milliseconds / 1e6, "unit": "GB/s", "bytes": moved[label]}
            else:
                flops = next(p.flops for p in products if str(p) == label)
                row |= {"rate": flops / milliseconds / 1e6, "unit": "Gflop/s", "flops": flops}
            rows.append(row)
        failed = [f"{label}: {error}" for label, error in times.failed.items()]
        return Result(self.name, title, _COLUMNS, rows, [_NOTE.format(rounds=config.rounds), *failed])


def _products(shapes: ModelShapes, dtype: torch.dtype) -> list[Product]:
    """Return [m×n]·[n×m] and [m×m]·[m×n], which have the same flops, for every hidden matrix with m ≤ n."""
    products = []
    for tensor in shapes.hidden(1):
        rows, columns = tensor.shape[0], tensor.numel // tensor.shape[0]
        short, long = min(rows, columns), max(rows, columns)
        products += [
            Product(1, short, long, short, dtype, (False, True)),
            Product(1, short, short, long, dtype),
        ]
    return products
