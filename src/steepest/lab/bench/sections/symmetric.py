"""Products with a symmetric result: computed whole, and at little more than half of the flops."""

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
from ..results import Column, Result, Row
from ..section import Setting
from ..shapes import ShapeList
from ..turns import Turn, take_turns
from ..watch import Watcher

_COLUMNS = (
    Column("what", "product"),
    Column("dtype", "dtype"),
    Column("plain_ms", "whole, ms", "ms"),
    Column("plain_rate", "Gflop/s", "rate"),
    Column("ms", "symmetric, ms", "ms"),
    Column("times_faster", "whole over symmetric", "ratio"),
    Column("reason", ""),
)
_NOTE = (
    "Medians of {rounds} rounds in which both take turns, on the model's hidden matrices stacked as Muon "
    "stacks them. Whole: the product as any two matrices are multiplied. Symmetric: {how}. Above 1 the "
    "symmetric one is faster; half of the flops would be 2. Gflop/s are those of the whole product."
)
# Muon's bucket_bytes in its working copies of float32, which bound how many matrices it takes together.
_STACK_BYTES = (1 << 28) // 12

_BY_PANELS = (
    "by panels below the diagonal, which are copied to the other side; whole where panels would be "
    "narrower than pays"
)
_BY_TRITON = (
    "by tiles on and below the diagonal, in Triton; whole up to 128 rows, or 64 of float32 without TF32. "
    "It is on where steepest.linalg.preferred_symmetric_kernel('triton') was called, and off by default"
)
_NO_TRITON = "Triton is not installed: both are the same product"


@dataclass(frozen=True)
class Stack:
    """[count, rows, inner] whose Gram matrix is taken, or [count, rows, rows] of which a polynomial is."""

    count: int
    rows: int
    inner: int
    dtype: torch.dtype
    squared: bool = False

    @property
    def flops(self) -> int:
        """Of the whole product."""
        return 2 * self.count * self.rows**2 * self.inner

    @property
    def what(self) -> str:
        """The product in symbols."""
        many = f"{self.count}×" if self.count > 1 else ""
        formula = "βR + αR²" if self.squared else "X Xᵀ"
        return f"{formula}, {many}[{self.rows}×{self.inner}]"

    def turns(self, device: torch.device) -> tuple[Turn, Turn]:
        """The whole product and the symmetric one, of the same numbers."""
        with seeded(0):
            x = torch.randn(self.count, self.rows, self.inner, device=device).div_(self.inner**0.5)
        x = (x + x.mT).to(self.dtype) if self.squared else x.to(self.dtype)
        given: dict[str, Any] = {"added": x, "alpha": 2.0, "beta": -3.0} if self.squared else {}
        other = x if self.squared else x.mT
        acts = {"whole": product, "symmetric": mirrored_product}
        whole, symmetric = (
            Turn(name, partial(act, x, other, **given), queued=device.type != "cpu")
            for name, act in acts.items()
        )
        return whole, symmetric


class Symmetric:
    """A table a model: what halving the flops saves, on this device."""

    name = "symmetric"

    def pieces(self, setting: Setting) -> int:
        """One a model."""
        return len(setting.models)

    def run(self, setting: Setting, watcher: Watcher) -> Iterator[Result]:
        """A table a model."""
        for shapes in setting.models:
            watcher.begun(f"symmetric products, at {shapes.title}'s shapes")
            rows: list[Row] = []
            try:
                with _by_tiles(setting.device) as how:
                    chosen = stacks(shapes, setting.blocks)
                    for number, each in enumerate(chosen):
                        rows.append(_row(each, setting))
                        watcher.ticked((number + 1) / len(chosen))
            except KeyboardInterrupt:
                yield self._result(rows, shapes, setting, how)
                raise
            watcher.finished()
            yield self._result(rows, shapes, setting, how)

    def _result(self, rows: list[Row], shapes: ShapeList, setting: Setting, how: str) -> Result:
        title = f"Symmetric products at {shapes.title}'s shapes"
        return Result(self.name, title, _COLUMNS, rows, [_NOTE.format(rounds=setting.rounds, how=how)])


def _row(stack: Stack, setting: Setting) -> Row:
    row: Row = {
        "what": stack.what,
        "dtype": str(stack.dtype).removeprefix("torch."),
        "flops": stack.flops,
        "reason": "",
    }
    device = setting.device
    turns = stack.turns(device)
    times = take_turns(turns, setting.rounds, lambda: now(device))
    if times.failed:
        return row | {"status": "failed", "reason": next(iter(times.failed.values()))}
    whole, symmetric = (turn.label for turn in turns)
    spent = times.median_ms(whole)
    return row | {
        "status": "ok",
        "rounds": len(times.seconds[whole]),
        "plain_ms": spent,
        "plain_rate": stack.flops / spent / 1e6,
        "plain_quartiles_ms": times.quartiles_ms(whole),
        "ms": times.median_ms(symmetric),
        "quartiles_ms": times.quartiles_ms(symmetric),
        "times_faster": times.ratio(whole, symmetric),
    }


def stacks(shapes: ShapeList, blocks: int | None) -> list[Stack]:
    """What the hidden matrices of so many blocks are stacked to, each kind once, in both dtypes."""
    counts = Counter((tensor.shape[0], tensor.numel // tensor.shape[0]) for tensor in shapes.hidden(blocks))
    found: dict[Stack, None] = {}
    for (rows, columns), count in counts.items():
        most = max(1, _STACK_BYTES // (4 * rows * columns))
        short, long = min(rows, columns), max(rows, columns)
        for dtype in (torch.bfloat16, torch.float32):
            found[Stack(min(count, most), short, long, dtype)] = None
            found[Stack(min(count, most), short, short, dtype, squared=True)] = None
    return list(found)


@contextmanager
def _by_tiles(device: torch.device) -> Iterator[str]:
    """Within it CUDA's symmetric products are Triton's, if it is there; how they are computed, in words."""
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
