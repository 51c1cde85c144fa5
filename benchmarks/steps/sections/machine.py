"""The machine's memory bandwidth over the model's tensors and flops of products with the model's shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from steepest.model_shapes import ModelShapes

from ..bandwidth import AXPY, COPY, axpy, axpy_bytes, copy, copy_bytes
from ..config import BenchConfig, log
from ..params import SharedParams
from ..products import Product
from ..results import Column, Result, Row, timed

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


def run(config: BenchConfig) -> Iterator[Result]:
    """Yield a table per model: memory bandwidth, and matrix products in float32 and bfloat16."""
    for shapes in config.models:
        log(f"the machine with {shapes.title}'s shapes")
        shared = SharedParams.create(shapes.tensors, config.device, config.dtype)
        moved = {AXPY: axpy_bytes(shared), COPY: copy_bytes(shared)}
        products = {str(p): p for dtype in (torch.float32, torch.bfloat16) for p in _products(shapes, dtype)}
        calls: dict[str, Callable[[], object]] = {AXPY: partial(axpy, shared), COPY: partial(copy, shared)}
        calls |= {label: product.runner(config.device) for label, product in products.items()}
        rows: list[Row] = []
        for label, timing in config.time(calls).items():
            row: Row = {"what": label, **timed(timing)}
            done = moved.get(label) or products[label].flops
            row |= {"rate": done / row["ms"] / 1e6, "unit": "GB/s" if label in moved else "Gflop/s"}
            rows.append(row)
        note = _NOTE.format(rounds=config.rounds)
        yield Result("machine", f"The machine with {shapes.title}'s shapes", _COLUMNS, rows, [note])


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
