"""Logical matrices: a parameter, or the blocks of a fused or transposed one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.engine.collect import ParamUpdate
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
        columns: its part of the parameter, the gradient and the state per element.
        extent: its places in the parameter; None if it is all of it.
    """

    member: ParamUpdate
    suffix: str
    kind: MatrixKind
    columns: list[Tensor]
    extent: Extent | None


def view_of(config: UpdateConfig, label: str | None) -> Any:
    """How the group says a parameter is cut; None for one matrix as it lies."""
    views = config.group["views"]
    return views.get(label) if views else None


def cut_blocks(config: UpdateConfig, tensor: Tensor, view: Any) -> list[tuple[str, Tensor]]:
    """(suffix, block) of every matrix of a tensor of the parameter's shape."""
    if view is None:
        return [("", tensor)]
    blocks = cut(tensor, view, config.group.get("view") == "batch")
    if not view[1]:  # a whole one, transposed
        return [("", blocks[0])]
    return [(f".{number}", block) for number, block in enumerate(blocks)]


def blocks_of(config: UpdateConfig, member: ParamUpdate) -> list[MatrixBlock]:
    """The logical matrices of a parameter whose state is made."""
    view = view_of(config, member.label)
    if view is None:
        return [MatrixBlock(member, "", config.matrix(member.param.shape), member.columns, None)]
    # A block of a contiguous tensor says where its elements lie in it.
    whole = torch.empty(member.param.shape, device="meta")
    cuts = [cut_blocks(config, column, view) for column in (whole, *member.columns)]
    return [
        MatrixBlock(
            member,
            suffix,
            config.matrix(place.shape),
            [column for _, column in columns],
            Extent(int(place.storage_offset()), place.stride()),
        )
        for (suffix, place), *columns in zip(*cuts, strict=True)
    ]
