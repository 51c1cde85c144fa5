"""Compute symmetric products with Triton on CUDA: compute the lower tiles and store each on both sides."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # only torch's CUDA builds for Linux install Triton
    triton = None

__all__ = ["AVAILABLE", "INTERPRETED", "Tiles", "mirrored", "serves", "tiles_of"]

AVAILABLE = triton is not None

# Whether kernels run in Triton's interpreter, which accepts CPU tensors. It would multiply the bits of
# bfloat16 values as integers, so the kernel converts its operands to float32 there, exactly. Triton reads the
# same variable when it decorates a kernel, so when this file is imported.
INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


class Tiles(NamedTuple):
    """Tile sizes and launch options: ``size`` rows and columns per program, ``deep`` inner elements."""

    size: int
    deep: int
    warps: int
    stages: int


# Not autotuned: other tiles sum in another order, so runs would not be repeatable. Operands take
# 2·size·deep·itemsize of shared memory per stage, 96 KiB for three stages of _HALF and _TF32; a block may use
# 99 KiB on compute capability 8.6, 8.9 and 12, more on 8.0, 9 and 10, and older devices have no bfloat16
# products. Without tensor cores, operands pass through registers too, so that tile is small. None of the
# three spills registers.
_HALF = Tiles(size=128, deep=64, warps=8, stages=3)
_TF32 = Tiles(size=128, deep=32, warps=8, stages=3)
_FLOAT32 = Tiles(size=64, deep=16, warps=4, stages=2)


def tiles_of(dtype: torch.dtype) -> tuple[Tiles, str]:
    """Return the tiles for a dtype, and the precision of float32 products, which is that of torch."""
    if dtype != torch.float32:
        return _HALF, "ieee"
    return (_TF32, "tf32") if torch.backends.cuda.matmul.fp32_precision == "tf32" else (_FLOAT32, "ieee")


def serves(x: Tensor, y: Tensor, added: Tensor | None) -> bool:
    """Return whether the kernel supports these operands, of shapes that match, and more than one tile."""
    *batch, rows, inner = x.shape
    others = [(y, (*batch, inner, rows))] + ([] if added is None else [(added, (*batch, rows, rows))])
    return (
        x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and rows > tiles_of(x.dtype)[0].size
        and all((o.dtype, o.device, o.shape) == (x.dtype, x.device, shape) for o, shape in others)
        and _runs_on(x.device)
    )


def _runs_on(device: torch.device) -> bool:
    if device.type == "cpu":
        return INTERPRETED
    if device.type != "cuda" or torch.version.cuda is None or not AVAILABLE:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


if AVAILABLE:

    @triton.jit  # type: ignore[untyped-decorator]
    def lower_tiles(  # type: ignore[no-untyped-def]
        x, y, added, out, rows, inner, tiles,
        x_batch, x_row, x_inner, y_batch, y_inner, y_column, added_batch, added_row, added_column,
        alpha, beta,
        ADDS: tl.constexpr, WIDENS: tl.constexpr, PRECISION: tl.constexpr,
        SIZE: tl.constexpr, DEEP: tl.constexpr,
    ):  # fmt: skip
        """Compute one tile of β added + α X Y on or below the diagonal, and store its mirror image too."""
        program = tl.program_id(0)
        # Offsets need 64 bits: a batch may have more than 2³¹ elements.
        batch = (program // tiles).to(tl.int64)
        tile = program % tiles
        # tile = i(i + 1)/2 + j with j ≤ i. The device approximates the square root, so i may be off by one.
        i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
        i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
        i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
        j = tile - i * (i + 1) // 2

        row = (i * SIZE + tl.arange(0, SIZE)).to(tl.int64)
        column = (j * SIZE + tl.arange(0, SIZE)).to(tl.int64)
        depth = tl.arange(0, DEEP).to(tl.int64)
        left = x + batch * x_batch + row[:, None] * x_row + depth[None, :] * x_inner
        right = y + batch * y_batch + depth[:, None] * y_inner + column[None, :] * y_column
        row_there = (row < rows)[:, None]
        column_there = (column < rows)[None, :]
        x_step = tl.cast(x_inner, tl.int64) * DEEP
        y_step = tl.cast(y_inner, tl.int64) * DEEP

        # tl.zeros is itself a kernel, interpreted only if TRITON_INTERPRET was set when Triton was imported.
        sums = tl.full((SIZE, SIZE), 0.0, dtype=tl.float32)
        for first in range(0, inner, DEEP):
            one = tl.load(left, mask=row_there & (depth < inner - first)[None, :], other=0.0)
            two = tl.load(right, mask=(depth < inner - first)[:, None] & column_there, other=0.0)
            if WIDENS:
                one, two = one.to(tl.float32), two.to(tl.float32)
            sums = tl.dot(one, two, sums, input_precision=PRECISION)
            left += x_step
            right += y_step
        sums = alpha * sums

        # Elements above the diagonal are copies of those below, also inside diagonal tiles: the result is
        # exactly symmetric, and no element is written twice.
        below = row_there & column_there & (row[:, None] >= column[None, :])
        above = row_there & column_there & (row[:, None] > column[None, :])
        if ADDS:
            from_ = added + batch * added_batch + row[:, None] * added_row + column[None, :] * added_column
            sums += beta * tl.load(from_, mask=below, other=0.0).to(tl.float32)
        result = sums.to(out.dtype.element_ty)
        into = out + batch * rows * rows
        tl.store(into + row[:, None] * rows + column[None, :], result, mask=below)
        tl.store(into + column[:, None] * rows + row[None, :], tl.trans(result), mask=tl.trans(above))


def mirrored(
    x: Tensor,
    y: Tensor,
    *,
    added: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    tiles: Tiles | None = None,
) -> Tensor:
    """Compute β ``added`` + α X Y of [..., n, k] and [..., k, n], exactly symmetric, summed in float32.

    Of ``added``, only elements on and below the diagonal are read, and none with ``beta=0``.
    """
    *batch, rows, inner = x.shape
    out = torch.empty(*batch, rows, rows, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    known, precision = tiles_of(x.dtype)
    cut = tiles or known
    # These are views, unless the batch dimensions have no common stride.
    stack = x.shape[:-2].numel()
    x, y = x.reshape(stack, rows, inner), y.reshape(stack, inner, rows)
    adds = added is not None and beta != 0
    third = (added if added is not None and adds else out).reshape(stack, rows, rows)
    across = triton.cdiv(rows, cut.size)
    count = across * (across + 1) // 2
    kernel: Any = lower_tiles
    # Triton launches on the current device, which may differ from the operands' device.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernel[(count * stack,)](
            x, y, third, out, rows, inner, count,
            *x.stride(), *y.stride(), *third.stride(), alpha, beta,
            ADDS=adds, WIDENS=INTERPRETED, PRECISION=precision, SIZE=cut.size, DEEP=cut.deep,
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
    return out
