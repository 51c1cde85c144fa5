"""Choose the process that computes each matrix, and the order in which matrices travel to it.

Everything here is a function of shapes, placements and mesh, so that all processes find the same without
communication.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from steepest.distributed.layout import Region

__all__ = ["Load", "assign", "balance", "is_empty", "overlap", "team_size", "waves"]


class Load(NamedTuple):
    """What a matrix costs its owner.

    Attributes:
        cost: flops of a step.
        memory: bytes of state that only the owner keeps.
        holders: the ranks of the team that may own it, if not all: those that hold all of it already.
    """

    cost: float
    memory: float = 0
    holders: tuple[int, ...] | None = None


def team_size(replicas: int, shards: int, matrices: int) -> int:
    """Return how many replicas share the work: the most that have a matrix for each of their processes.

    >>> team_size(8, 8, 560), team_size(64, 64, 560), team_size(4, 2, 5)
    (8, 8, 2)
    """
    fitting = [g for g in range(1, replicas + 1) if replicas % g == 0 and g * shards <= matrices]
    return max(fitting, default=1)


def assign(loads: Sequence[Load], ranks: int, known: Sequence[int | None] = ()) -> list[int]:
    """Return the owner of each matrix: the most expensive ones first, each to the rank with the least work.

    Among ranks with equal work, it is the one with the least memory, then the lowest.

    Args:
        loads: the matrices'.
        ranks: how many share the work.
        known: owners that must stay; None where there is none yet.

    >>> assign([Load(1.0), Load(4.0), Load(2.0), Load(3.0)], 2)
    [0, 0, 1, 1]
    >>> assign([Load(4.0, holders=(1,)), Load(3.0), Load(2.0)], 2)
    [1, 0, 0]
    """
    owners: list[int | None] = [*known, *[None] * (len(loads) - len(known))]
    work, memory = [0.0] * ranks, [0.0] * ranks

    def give(at: int, rank: int) -> None:
        owners[at] = rank
        work[rank] += loads[at].cost
        memory[rank] += loads[at].memory

    for at, owner in enumerate(known):
        if owner is not None:
            give(at, owner)
    by_cost = sorted(range(len(loads)), key=lambda at: (-loads[at].cost, at))
    open_ = [at for at in by_cost if owners[at] is None]
    for at in open_:
        if (holders := loads[at].holders) is not None:
            give(at, min(holders, key=lambda rank: (work[rank], memory[rank], rank)))
    least = [(work[rank], memory[rank], rank) for rank in range(ranks)]
    heapq.heapify(least)
    for at in open_:
        if loads[at].holders is None:
            rank = least[0][2]
            give(at, rank)
            heapq.heapreplace(least, (work[rank], memory[rank], rank))
    return [owner for owner in owners if owner is not None]


def waves(owners: Sequence[int], loads: Sequence[Load], fill: Sequence[float]) -> list[list[int]]:
    """Cut owners' matrices, the most expensive first, into bucketfuls; wave k has the k-th of every owner.

    Args:
        owners: of the matrices.
        loads: the matrices'.
        fill: the part of a bucket that each takes; one that takes more than a bucket is alone in its wave.

    >>> waves([0, 0, 0, 1], [Load(3.0), Load(2.0), Load(1.0), Load(9.0)], [0.6, 0.5, 0.3, 0.1])
    [[0, 3], [1, 2]]
    """
    found: list[list[int]] = []
    level: dict[int, tuple[int, float]] = {}
    for at in sorted(range(len(owners)), key=lambda at: (-loads[at].cost, at)):
        wave, filled = level.get(owners[at], (0, 0.0))
        if filled > 0 and filled + fill[at] > 1:
            wave, filled = wave + 1, 0.0
        level[owners[at]] = wave, filled + fill[at]
        if wave == len(found):
            found.append([])
        found[wave].append(at)
    # The order of the parameters, so that equal shapes of one group lie side by side.
    return [sorted(wave) for wave in found]


def overlap(one: Region, other: Region) -> Region:
    """Return the box that two boxes share, which may be empty.

    >>> overlap(Region((0, 2), (4, 4)), Region((3, 0), (4, 3)))
    Region(first=(3, 2), shape=(1, 1))
    """
    first = tuple(map(max, one.first, other.first))
    ends = map(lambda a, n, b, m: min(a + n, b + m), one.first, one.shape, other.first, other.shape)
    shape = tuple(max(end - start, 0) for start, end in zip(first, ends, strict=True))
    # An empty box must lie within both as well.
    return Region(first, shape) if math.prod(shape) else Region(other.first, (0,) * len(shape))


def is_empty(region: Region) -> bool:
    """Return whether a box has no elements."""
    return math.prod(region.shape) == 0


def balance(owners: Iterable[int], loads: Sequence[Load], ranks: int) -> float:
    """Return the largest work of a rank over the mean.

    >>> balance([0, 1, 1], [Load(2.0), Load(1.0), Load(3.0)], 2)
    1.333...
    """
    work = [0.0] * ranks
    for owner, load in zip(owners, loads, strict=True):
        work[owner] += load.cost
    return max(work) * ranks / sum(work) if sum(work) else 1.0
