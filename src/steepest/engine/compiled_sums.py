"""Sum squares compiled: gradients are read once, and no float64 copy is written."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from steepest.compile.cache import compiled_once
from steepest.compile.unguarded import Code, compiled_code
from steepest.engine.compiled import TRACED_SIZES, laid_out
from steepest.engine.cuda_graphs import check_compiles_now
from steepest.engine.layout import Row

__all__ = ["sum_squares_compiled"]

_ROWS = len(TRACED_SIZES)


def sum_squares_compiled(grads: Sequence[Tensor], anchors: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return place -> Σ of the int64 bits of g² + anchor, for those gradients that compiled code can take.

    All gradients are on one device.
    """
    by_dtype: dict[torch.dtype, list[tuple[int, Tensor]]] = {}
    for place, grad in enumerate(grads):
        # Squares of float64 are rounded, and generated code may fuse the product with the sum.
        if grad.numel() > 0 and grad.dtype != torch.float64:
            columns = laid_out(Row([grad], {}), ordered=False)
            if columns is not None:
                by_dtype.setdefault(grad.dtype, []).append((place, columns[0]))
    found: dict[int, Tensor] = {}
    for dtype, served in by_dtype.items():
        device = served[0][1].device
        code = _code(dtype, device)
        if code is None:
            continue
        places = [place for place, _ in served]
        rows = [row for _, row in served]
        spare = -len(rows) % _ROWS
        rows += [torch.zeros(4, dtype=dtype, device=device)] * spare
        added = torch.stack([anchors[place] for place in places + places[:1] * spare]).view(-1, _ROWS)
        sums = torch.empty(added.shape, dtype=torch.int64, device=device)
        for at, (own, out) in enumerate(zip(added.unbind(), sums.unbind(), strict=True)):
            launch = rows[at * _ROWS : (at + 1) * _ROWS]
            code([row.numel() for row in launch], launch, (own, out))
        found.update(zip(places, sums.view(-1).unbind(), strict=False))
    return found


def _code(dtype: torch.dtype, device: torch.device) -> Code | None:
    """Return the code; None, with one warning, if it cannot be compiled."""
    return compiled_once(
        ("sum squares", dtype, device), functools.partial(_compile, dtype, device), "sums squares"
    )


def _compile(dtype: torch.dtype, device: torch.device) -> Code:
    check_compiles_now()
    rows = [[torch.zeros(size, dtype=dtype, device=device)] for size in TRACED_SIZES]
    anchors = torch.ones(_ROWS, dtype=torch.float64, device=device)
    return compiled_code(_graph, rows, (anchors, torch.zeros(_ROWS, dtype=torch.int64, device=device)))


def _graph(rows: Sequence[Sequence[Tensor]], anchors: Tensor, sums: Tensor) -> None:
    for at, (grad,) in enumerate(rows):
        wide = grad.to(torch.float64)
        sums[at].copy_((wide * wide + anchors[at]).view(torch.int64).sum())
