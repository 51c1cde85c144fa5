"""Products with a symmetric result: the full product against computing little more than half of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from steepest.linalg import preferred_symmetric_kernel
from steepest.linalg.product import product
from steepest.linalg.symmetric import mirrored_product

from ...clock import now
from ...seeding import seeded
from ..callbacks import Callback
from ..interleaved import Timer, time_interleaved
from ..results import Column, Result, Row
from ..section import BenchConfig
from ..shapes import ModelShapes

_COLUMNS = (
    Column("what", "product"),
    Column("dtype", "dtype"),
    Column("plain_ms", "full, ms", "ms"),
    Column("plain_rate", "Gflop/s", "rate"),
    Column("ms", "symmetric, ms", "ms"),
    Column("times_faster", "speedup", "ratio"),
    Column("reason", ""),
)
_NOTE = (
    "Medians of {rounds} interleaved rounds, on the model's hidden matrices stacked as Muon stacks them. "
    "Full: an ordinary matrix product. Symmetric: {how}. The speedup is full over symmetric time; half of "
    "the flops would give 2. Gflop/s are those of the full product."
)
# Muon's default bucket_bytes divided by its float32 working copies, which bounds the matrices per stack.
_STACK_BYTES = (1 << 28) // 12

_BY_PANELS = (
    "panels below the diagonal are computed and copied to the other side; matrices too small for this use "
    "the full product"
)
_BY_TRITON = (
    "a Triton kernel computes the tiles on and below the diagonal; matrices up to 128 rows, or 64 in float32 "
    "without TF32, use the full product. Enable it with "
    "steepest.linalg.preferred_symmetric_kernel('triton'); it is off by default"
)
_NO_TRITON = "Triton is not installed, so both are the same product"


@dataclass(frozen=True)
class Stack:
    """A stack [count, rows, inner] for Gram matrices or, if `squared`, [count, rows, rows] for a square."""

    count: int
    rows: int
    inner: int
    dtype: torch.dtype
    squared: bool = False

    @property
    def flops(self) -> int:
        """Flops of the full product."""
        return 2 * self.count * self.rows**2 * self.inner

    @property
    def formula(self) -> str:
        """The product as a formula."""
        many = f"{self.count}×" if self.count > 1 else ""
        formula = "βR + αR²" if self.squared else "X Xᵀ"
        return f"{formula}, {many}[{self.rows}×{self.inner}]"

    def timers(self, device: torch.device) -> tuple[Timer, Timer]:
        """Return timers for the full and the symmetric product of the same matrices."""
        with seeded(0):
            x = torch.randn(self.count, self.rows, self.inner, device=device).div_(self.inner**0.5)
        x = (x + x.mT).to(self.dtype) if self.squared else x.to(self.dtype)
        options: dict[str, Any] = {"added": x, "alpha": 2.0, "beta": -3.0} if self.squared else {}
        other = x if self.squared else x.mT
        functions = {"full": product, "symmetric": mirrored_product}
        full, symmetric = (
            Timer(name, partial(function, x, other, **options), queued=device.type != "cpu")
            for name, function in functions.items()
        )
        return full, symmetric


class Symmetric:
    """A table per model with the speedup of symmetric products on this device."""

    name = "symmetric"

    def work_units(self, config: BenchConfig) -> int:
        """Return the number of models."""
        return len(config.models)

    def run(self, config: BenchConfig, callback: Callback) -> Iterator[Result]:
        """Yield a table per model."""
        for shapes in config.models:
            callback.on_unit_start(f"symmetric products with {shapes.title}'s shapes")
            rows: list[Row] = []
            try:
                with _symmetric_kernel(config.device) as how:
                    all_stacks = stacks(shapes, config.blocks)
                    for number, stack in enumerate(all_stacks):
                        rows.append(_row(stack, config))
                        callback.on_progress((number + 1) / len(all_stacks))
            except KeyboardInterrupt:
                yield self._result(rows, shapes, config, how)
                raise
            callback.on_unit_end()
            yield self._result(rows, shapes, config, how)

    def _result(self, rows: list[Row], shapes: ModelShapes, config: BenchConfig, how: str) -> Result:
        title = f"Symmetric products with {shapes.title}'s shapes"
        return Result(self.name, title, _COLUMNS, rows, [_NOTE.format(rounds=config.rounds, how=how)])


def _row(stack: Stack, config: BenchConfig) -> Row:
    row: Row = {
        "what": stack.formula,
        "dtype": str(stack.dtype).removeprefix("torch."),
        "flops": stack.flops,
        "reason": "",
    }
    timers = stack.timers(config.device)
    times = time_interleaved(timers, config.rounds, lambda: now(config.device))
    if times.failed:
        return row | {"status": "failed", "reason": next(iter(times.failed.values()))}
    full, symmetric = (timer.label for timer in timers)
    milliseconds = times.median_ms(full)
    return row | {
        "status": "ok",
        "rounds": len(times.seconds[full]),
        "plain_ms": milliseconds,
        "plain_rate": stack.flops / milliseconds / 1e6,
        "plain_quartiles_ms": times.quartiles_ms(full),
        "ms": times.median_ms(symmetric),
        "quartiles_ms": times.quartiles_ms(symmetric),
        "times_faster": times.ratio(full, symmetric),
    }


def stacks(shapes: ModelShapes, blocks: int | None) -> list[Stack]:
    """Return the distinct stacks of the hidden matrices of `blocks` blocks, in both dtypes."""
    counts = Counter((tensor.shape[0], tensor.numel // tensor.shape[0]) for tensor in shapes.hidden(blocks))
    distinct: dict[Stack, None] = {}
    for (rows, columns), count in counts.items():
        size = min(count, max(1, _STACK_BYTES // (4 * rows * columns)))
        short, long = min(rows, columns), max(rows, columns)
        for dtype in (torch.bfloat16, torch.float32):
            distinct[Stack(size, short, long, dtype)] = None
            distinct[Stack(size, short, short, dtype, squared=True)] = None
    return list(distinct)


@contextmanager
def _symmetric_kernel(device: torch.device) -> Iterator[str]:
    """On CUDA, prefer the Triton kernel within this context; yield a description of the kernel."""
    if device.type != "cuda":
        yield _BY_PANELS
        return
    before = preferred_symmetric_kernel()
    try:
        preferred_symmetric_kernel("triton")
    except ModuleNotFoundError:
        yield _NO_TRITON
        return
    try:
        yield _BY_TRITON
    finally:
        preferred_symmetric_kernel(before)
