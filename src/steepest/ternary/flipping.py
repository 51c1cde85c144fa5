"""The arithmetic of a step: votes go into the accumulator, and where it is full the weight moves by one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from steepest.random import Key, bits32, uniform
from steepest.ternary.ballot import Outward
from steepest.ternary.packing import pack, unpack
from steepest.ternary.pieces import row_pieces

__all__ = ["accumulated", "flip_layer", "flipped", "pull"]

# Streams of the step's noise.
_PULL, _TIES = 0, 1


def pull(values: Tensor, chance: float, u: Tensor) -> Tensor:
    """One vote toward 0 with probability ``chance``, where u, uniform in [0, 1), is below it.

    >>> pull(torch.tensor([1, -1, 0, 1]), 0.5, torch.tensor([0.1, 0.1, 0.1, 0.9])).tolist()
    [-1, 1, 0, 0]
    """
    return torch.where(u < chance, -values, 0)


def accumulated(accumulator: Tensor, votes: Tensor, values: Tensor, outward: Outward) -> Tensor:
    """a + v, saturating at the largest number of a's dtype and at its negative.

    Args:
        accumulator: a, int8 or int16.
        votes: v, integers wide enough for the sum.
        values: T.
        outward: ``"cancel"``: at a bound, a stops at 0 where it would point outward.

    >>> accumulator, values = torch.tensor([120, -5], dtype=torch.int8), torch.tensor([0, -1])
    >>> accumulated(accumulator, torch.tensor([20, 1], dtype=torch.int16), values, "drop").tolist()
    [127, -4]
    """
    limit = torch.iinfo(accumulator.dtype).max
    total = (accumulator + votes).clamp(-limit, limit)
    if outward == "cancel":
        total = torch.where(total * values > 0, 0, total)
    return total.to(accumulator.dtype)


def flipped(values: Tensor, accumulator: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(T + sign(a) within {−1, 0, 1}, 0) where chosen, and (T, a) elsewhere.

    >>> values, accumulator = (torch.tensor(each, dtype=torch.int8) for each in ([-1, 0, 1], [9, -9, 9]))
    >>> [each.tolist() for each in flipped(values, accumulator, torch.tensor([True, True, False]))]
    [[0, -1, 1], [0, 0, 9]]
    """
    moved = (values + accumulator.sign()).clamp(-1, 1).to(values.dtype)
    return torch.where(chosen, moved, values), torch.where(chosen, 0, accumulator)


def flip_layer(
    packed: Tensor,
    accumulator: Tensor,
    pending: Tensor,
    *,
    threshold: int,
    outward: Outward,
    zero_pull: float,
    at_most: int | None,
    key: Key,
) -> Tensor:
    """Take a layer's votes in and flip, in place; the number of flips, 0-dim int64.

    Args:
        packed: T, uint8 [out, ⌈in/4⌉].
        accumulator: a, int8 or int16 [out, in].
        pending: the sum of the step's votes, integers [out, in].
        threshold: flip where |a| is at least this.
        outward: see :func:`accumulated`.
        zero_pull: probability of a vote toward 0.
        at_most: flip no more than this many: the largest |a| first, ties by lot. None: no bound. (Finding
            them waits for the device.)
        key: of the noise.
    """
    rows, columns = accumulator.shape
    limit = torch.iinfo(accumulator.dtype).max
    narrow = accumulator.dtype == pending.dtype == torch.int8
    wide = torch.int16 if narrow else torch.int32
    flips = torch.zeros((), dtype=torch.int64, device=packed.device)
    chosen: Tensor | None = None

    def blocks() -> Iterator[tuple[slice, Tensor, Tensor]]:
        for part in row_pieces(rows, columns, packed.device):
            yield part, unpack(packed[part], columns), accumulator[part]

    def index(part: slice) -> Tensor:
        first, last = part.start * columns, part.stop * columns
        return torch.arange(first, last, device=packed.device).view(-1, columns)

    def settle(part: slice, values: Tensor, a: Tensor, over: Tensor) -> None:
        moved, left = flipped(values, a, over)
        packed[part] = pack(moved)
        accumulator[part] = left
        flips.add_((moved != values).sum())

    for part, values, a in blocks():
        votes = pending[part].to(wide)
        if zero_pull > 0:
            votes = votes + pull(values, zero_pull, uniform(key, index(part), _PULL))
        a = accumulated(a, votes, values, outward)
        if at_most is not None or threshold > limit:
            accumulator[part] = a
        else:
            settle(part, values, a, a.abs() >= threshold)
    if at_most is not None and threshold <= limit:
        chosen = _choose(accumulator, threshold, at_most, key)
        for part, values, a in blocks():
            settle(part, values, a, chosen[part])
    return flips


def _choose(accumulator: Tensor, threshold: int, at_most: int, key: Key) -> Tensor:
    """Which of those with |a| ≥ threshold flip where only so many may: bool, of a's shape."""
    chosen = accumulator.abs() >= threshold
    places = chosen.view(-1).nonzero().view(-1)
    if len(places) > at_most:
        sizes = accumulator.view(-1)[places].abs().to(torch.int64)
        # One number to sort by: |a|, then the lot, then the place, so that no two are equal.
        order = (sizes << 48) | ((bits32(key, places, _TIES) >> 16) << 32) | places
        kept = places[order.topk(at_most).indices]
        chosen.zero_()
        chosen.view(-1)[kept] = True
    return chosen
