"""Split parameters into logical matrices: the whole tensor, or the blocks of a fused or transposed one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.engine.batches import ParamUpdate
from steepest.engine.layout import Extent
from steepest.engine.update import MatrixKind, UpdateConfig
from steepest.views import cut

__all__ = ["MatrixBlock", "blocks_of", "cut_blocks", "view_of"]


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
        rows: the first index and the number of its matrices in a batch; None if it has all of them.
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
    if view is None:
        return [("", tensor)]
    blocks = cut(tensor, view, config.rule.counts_matrices(config.group))
    if not view[1]:  # a whole one, transposed
        return [("", blocks[0])]
    return [(f".{number}", block) for number, block in enumerate(blocks)]


def blocks_of(config: UpdateConfig, member: ParamUpdate) -> list[MatrixBlock]:
    """List the logical matrices of a parameter that has its state."""
    view = view_of(config, member.label)
    if view is None:
        shape = member.param.shape
        return [MatrixBlock(member, "", config.matrix(shape), shape, member.columns, None)]
    # The blocks of a contiguous meta tensor give each element's place by their offset and strides.
    whole = torch.empty(member.param.shape, device="meta")
    cuts = [cut_blocks(config, column, view) for column in (whole, *member.columns)]
    return [
        MatrixBlock(
            member,
            suffix,
            config.matrix(place.shape),
            place.shape,
            [column for _, column in columns],
            Extent(int(place.storage_offset()), place.stride()),
        )
        for (suffix, place), *columns in zip(*cuts, strict=True)
    ]
