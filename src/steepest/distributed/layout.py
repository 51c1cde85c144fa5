"""Compute from placements which part of a tensor each process of a mesh holds."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

__all__ = ["Layout", "Region", "layout_of", "region_at"]


class Region(NamedTuple):
    """A box within a tensor: the first index and the size in each dimension."""

    first: tuple[int, ...]
    shape: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """Return this part of a tensor as a view; further dimensions of the tensor stay whole."""
        for dim, (first, size) in enumerate(zip(self.first, self.shape, strict=True)):
            if size != tensor.shape[dim]:
                tensor = tensor.narrow(dim, first, size)
        return tensor


class Cut(NamedTuple):
    """How one mesh dimension of size ``parts`` cuts a tensor's dimension.

    The indices are cut into ``factor`` pieces, and each coordinate holds its part of every piece. Only
    ``_StridedShard`` has a factor above 1.
    """

    parts: int
    factor: int


Runs = list[range]


@dataclass(frozen=True, slots=True)
class Layout:
    """The regions of a tensor at all coordinates of a mesh.

    Attributes:
        mesh_dims: for each dimension of the tensor, the mesh dimensions that cut it.
        intervals: for each dimension of the tensor, the coordinate along those mesh dimensions -> indices.
    """

    mesh_dims: tuple[tuple[int, ...], ...]
    intervals: tuple[dict[tuple[int, ...], range], ...]

    def region(self, coordinate: Sequence[int]) -> Region:
        """Return the region at a coordinate of the mesh.

        >>> from torch.distributed.tensor import Replicate, Shard
        >>> layout_of((5, 2), (2, 3), (Replicate(), Shard(0))).region((1, 2))
        Region(first=(4, 0), shape=(1, 2))
        """
        held = [
            intervals[tuple([coordinate[at] for at in dims])]
            for dims, intervals in zip(self.mesh_dims, self.intervals, strict=True)
        ]
        return Region(tuple([run.start for run in held]), tuple([len(run) for run in held]))


@functools.lru_cache(maxsize=4096)
def region_at(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    placements: Sequence[Placement],
    coordinate: tuple[int, ...],
) -> Region:
    """Return the region at one coordinate of :func:`layout_of`; cached for the steps."""
    return layout_of(shape, mesh_shape, placements).region(coordinate)


@functools.lru_cache(maxsize=4096)
def layout_of(shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: Sequence[Placement]) -> Layout:
    """Compute the layout of a tensor on a mesh.

    Raises:
        ValueError: a ``Partial`` placement, or placements that do not give each process one interval of
            each dimension. The message continues a sentence that begins with the parameter.
    """
    cuts: list[list[Cut]] = [[] for _ in shape]
    mesh_dims: list[list[int]] = [[] for _ in shape]
    for at, (placement, parts) in enumerate(zip(placements, mesh_shape, strict=True)):
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if placement.is_partial() or dim is None:
            raise ValueError(
                f"has the placement {placement}, under which no process has its elements: redistribute it to "
                "Replicate or Shard"
            )
        cuts[dim].append(Cut(parts, int(getattr(placement, "split_factor", 1))))
        mesh_dims[dim].append(at)
    intervals = []
    for dim, (size, own) in enumerate(zip(shape, cuts, strict=True)):
        found = _intervals(size, tuple(own))
        if found is None:
            raise ValueError(
                f"has the placements {_words(placements)} on a mesh of {tuple(mesh_shape)}, which cut "
                f"dimension {dim} of size {size} unevenly and do not determine each process's indices: "
                "use a size that the mesh divides"
            )
        intervals.append(found)
    return Layout(tuple(map(tuple, mesh_dims)), tuple(intervals))


def _words(placements: Sequence[Placement]) -> str:
    return f"({', '.join(map(str, placements))})"


@functools.lru_cache(maxsize=4096)
def _intervals(size: int, cuts: tuple[Cut, ...]) -> dict[tuple[int, ...], range] | None:
    """Return the indices at each coordinate; None if some are not one interval, or are ambiguous.

    FSDP2 cuts the shards of tensor parallelism, and records it as a ``_StridedShard`` to the left of a
    ``Shard``. torch reads placements from left to right; with uneven sizes, that order may give a process
    other indices than FSDP2 gave it.
    """
    strided = [at for at, cut in enumerate(cuts) if cut.factor > 1]
    as_cut = [at for at in range(len(cuts)) if at not in strided] + strided[::-1]
    found = {}
    for coordinate in itertools.product(*(range(cut.parts) for cut in cuts)):
        runs: Runs = [range(size)]
        for cut, index in zip(cuts, coordinate, strict=True):
            pieces = [_chunk(runs, cut.factor, at) for at in range(cut.factor)]
            runs = _joined(_chunk(piece, cut.parts, index) for piece in pieces)
        if strided:
            other: Runs = [range(size)]
            for at in as_cut:
                other = _chunk(other, cuts[at].parts, coordinate[at])
            if other != runs:
                return None
        if len(runs) > 1:
            return None
        found[coordinate] = runs[0] if runs else range(0)
    return found


def _chunk(runs: Runs, parts: int, index: int) -> Runs:
    """Return one of the chunks of torch.chunk; it is empty if there are too few."""
    width = -(-sum(map(len, runs)) // parts)
    return _slice(runs, index * width, (index + 1) * width)


def _slice(runs: Runs, first: int, last: int) -> Runs:
    found = []
    for run in runs:
        part = run[max(first, 0) : max(last, 0)]
        if len(part) > 0:
            found.append(part)
        first, last = first - len(run), last - len(run)
    return found


def _joined(pieces: Iterable[Runs]) -> Runs:
    joined: Runs = []
    for runs in pieces:
        for run in runs:
            if joined and joined[-1].stop == run.start:
                joined[-1] = range(joined[-1].start, run.stop)
            else:
                joined.append(run)
    return joined
