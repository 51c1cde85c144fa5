"""Products with a symmetric result: the full product against computing little more than half of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from steepest.lab.training.seeding import seeded
from steepest.linalg import preferred_symmetric_kernel
from steepest.linalg.product import product
from steepest.linalg.symmetric import mirrored_product
from steepest.model_shapes import ModelShapes

from ..config import BenchConfig, log
from ..results import Column, Result, Row, timed

_COLUMNS = (
    Column("what", "product"),
    Column("dtype", "dtype"),
    Column("plain_ms", "full, ms", "ms"),
    Column("plain_rate", "Gflop/s", "rate"),
    Column("ms", "symmetric, ms", "ms"),
    Column("times_faster", "speedup", "ratio"),
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

    def calls(self, device: torch.device) -> dict[str, Callable[[], object]]:
        """Return the full and the symmetric product of the same matrices."""
        with seeded(0):
            x = torch.randn(self.count, self.rows, self.inner, device=device).div_(self.inner**0.5)
        x = (x + x.mT).to(self.dtype) if self.squared else x.to(self.dtype)
        options: dict[str, Any] = {"added": x, "alpha": 2.0, "beta": -3.0} if self.squared else {}
        other = x if self.squared else x.mT
        functions = {"full": product, "symmetric": mirrored_product}
        return {name: partial(function, x, other, **options) for name, function in functions.items()}


def run(config: BenchConfig) -> Iterator[Result]:
    """Yield a table per model with the speedup of symmetric products on this device."""
    for shapes in config.models:
        log(f"symmetric products with {shapes.title}'s shapes")
        with _symmetric_kernel(config.device) as how:
            rows = [_row(stack, config) for stack in stacks(shapes, config.blocks)]
        title = f"Symmetric products with {shapes.title}'s shapes"
        yield Result("symmetric", title, _COLUMNS, rows, [_NOTE.format(rounds=config.rounds, how=how)])


def _row(stack: Stack, config: BenchConfig) -> Row:
    times = config.time(stack.calls(config.device))
    full, symmetric = times["full"], times["symmetric"]
    return {
        "what": stack.formula,
        "dtype": str(stack.dtype).removeprefix("torch."),
        "flops": stack.flops,
        "plain_ms": full.median_ms,
        "plain_rate": stack.flops / full.median_ms / 1e6,
        "plain_quartiles_ms": full.quartiles,
        **timed(symmetric),
        "times_faster": full.ratio(symmetric),
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
