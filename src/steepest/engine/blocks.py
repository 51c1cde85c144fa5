"""Split parameters into logical matrices: the whole tensor, or the blocks of a fused or transposed one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.engine.batches import ParamUpdate
from steepest.engine.layout import Extent
from steepest.engine.update import MatrixKind, UpdateConfig
from steepest.views import cut, matrix_shapes

__all__ = [
    "MatrixBlock",
    "blocks_of",
    "bucket_bytes",
    "cut_blocks",
    "rows_apart",
    "shapes_of",
    "view_of",
]

# Stacks that stay in a CPU's caches take a third of the time of large ones.
_CACHED = 1 << 23


@dataclass(slots=True)
class MatrixBlock:
    """One logical matrix of a parameter.

    Attributes:
        member: the parameter.
        suffix: of its entries' names in the parameter's state: ``""``, or ``".0"``, ``".1"``, … for blocks.
        kind: its shape as ``transform`` sees it, and its entries.
        shape: its shape before matrices are merged to that.
        columns: its part of the parameter, the gradient and the state per element; none where it is computed
            for other processes, which have them.
        extent: its places in the parameter; None if it is all of it.
        rows: the first index and the number of its matrices in a batch, or of its rows in a matrix whose
            rows are computed apart; None if it has all of them.
    """

    member: ParamUpdate
    suffix: str
    kind: MatrixKind
    shape: torch.Size
    columns: list[Tensor]
    extent: Extent | None
    rows: tuple[int, int] | None = None

    def entry(self, name: str) -> Tensor:
        """Return an entry of the state of this matrix."""
        value: Tensor = self.member.state[name + self.suffix]
        return value if self.rows is None else value.narrow(0, *self.rows)


def view_of(config: UpdateConfig, label: str | None) -> Any:
    """Return the parameter's view from the group's ``views``; None means one matrix, stored as it is."""
    views = config.group["views"]
    return views.get(label) if views else None


def cut_blocks(config: UpdateConfig, tensor: Tensor, view: Any) -> list[tuple[str, Tensor]]:
    """List (suffix, block) for each matrix of a tensor that has the parameter's shape."""
    blocks = cut(tensor, view, config.rule.counts_matrices(config.group))
    return list(zip(_suffixes(view, len(blocks)), blocks, strict=True))


def shapes_of(config: UpdateConfig, shape: torch.Size, view: Any) -> list[tuple[str, torch.Size]]:
    """List (suffix, shape) for each matrix of a parameter; unlike its block, an interleaved one is merged."""
    shapes = matrix_shapes(shape, view, config.rule.counts_matrices(config.group))
    return list(zip(_suffixes(view, len(shapes)), shapes, strict=True))


def _suffixes(view: Any, count: int) -> list[str]:
    whole = view is None or not view[1]  # perhaps transposed
    return [""] if whole else [f".{number}" for number in range(count)]


def rows_apart(config: UpdateConfig, shape: torch.Size) -> bool:
    """Return whether a parameter of this shape without a view may be cut into rows."""
    return len(shape) == 2 and config.rule.rows_apart(config.group) and config.matrix(shape).shape == shape


def bucket_bytes(config: UpdateConfig) -> int:
    """Return the bound on the working memory of matrices that a rule which streams computes together."""
    given: int = config.group["bucket_bytes"]
    return min(given, _CACHED) if config.device.type == "cpu" else given


def _rows_of(config: UpdateConfig, whole: MatrixBlock) -> Iterator[MatrixBlock]:
    """Cut a matrix with too much working memory into some of its rows each."""
    count, width = whole.shape
    fit = max(1, bucket_bytes(config) // (max(width, 1) * config.working_bytes))
    if fit >= count:
        yield whole
        return
    for first in range(0, count, fit):
        rows = min(fit, count - first)
        yield MatrixBlock(
            whole.member,
            "",
            config.matrix(torch.Size((rows, width))),
            torch.Size((rows, width)),
            [column.narrow(0, first, rows) for column in whole.columns],
            Extent(first * width, (width, 1)),
            (first, rows),
        )


def blocks_of(config: UpdateConfig, member: ParamUpdate) -> list[MatrixBlock]:
    """List the logical matrices of a parameter that has its state."""
    view = view_of(config, member.label)
    if view is None:
        shape = member.param.shape
        matrix = MatrixBlock(member, "", config.matrix(shape), shape, member.columns, None)
        if config.rule.streams and rows_apart(config, shape):
            return list(_rows_of(config, matrix))
        return [matrix]
    # The blocks of a contiguous meta tensor give each element's place by their offset and strides.
    whole = torch.empty(member.param.shape, device="meta")
    shapes = shapes_of(config, member.param.shape, view)
    cuts = [cut_blocks(config, column, view) for column in (whole, *member.columns)]
    return [
        MatrixBlock(
            member,
            suffix,
            config.matrix(shape),
            place.shape,
            [column for _, column in columns],
            Extent(int(place.storage_offset()), place.stride()),
        )
        for (suffix, shape), (_, place), *columns in zip(shapes, *cuts, strict=True)
    ]
