"""The arithmetic of a step: votes go into the accumulator, and where it is full the weight moves by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steepest.random import Key, bits32, uniform
from steepest.ternary.ballot import Outward
from steepest.ternary.packing import low_bits, pack, unpack
from steepest.ternary.pieces import in_pieces, places, row_pieces

__all__ = ["accumulated", "flip_layer", "flipped", "pull", "reached"]

# Streams of the step's noise.
_PULL, _TIES = 0, 1
# Ties are told apart by so many bits first.
_LOT_BITS = 16


# Where and masked_fill on integers take ten times as long as arithmetic on a CPU: masks are multiplied.


def pull(values: Tensor, chance: float, u: Tensor) -> Tensor:
    """One vote toward 0 with probability ``chance``, where u, uniform in [0, 1), is below it.

    >>> values = torch.tensor([1, -1, 0, 1], dtype=torch.int8)
    >>> pull(values, 0.5, torch.tensor([0.1, 0.1, 0.1, 0.9])).tolist()
    [-1, 1, 0, 0]
    """
    return -(values * (u < chance).view(torch.int8))


def accumulated(accumulator: Tensor, votes: Tensor, values: Tensor, outward: Outward) -> Tensor:
    """a + v, saturating at the largest number of a's dtype and at its negative; of the votes' dtype.

    Args:
        accumulator: a, int8 or int16.
        votes: v, integers wide enough for the sum.
        values: T, int8.
        outward: ``"cancel"``: at a bound, a stops at 0 where it would point outward.

    >>> accumulator, values = torch.tensor([[120, -5], [0, -1]], dtype=torch.int8)
    >>> accumulated(accumulator, torch.tensor([20, 1], dtype=torch.int16), values, "drop").tolist()
    [127, -4]
    """
    limit = torch.iinfo(accumulator.dtype).max
    total = accumulator.to(votes.dtype) + votes
    if outward == "drop":
        return total.clamp_(-limit, limit)
    wide = values.to(votes.dtype)
    high, low = (1 - wide.clamp(min=0)) * limit, (-1 - wide.clamp(max=0)) * limit
    return torch.minimum(torch.maximum(total, low), high)


def reached(accumulator: Tensor, threshold: int) -> Tensor:
    """Where |a| ≥ threshold: −1, all bits set, there and 0 elsewhere; of a's dtype.

    >>> reached(torch.tensor([3, -4, 5], dtype=torch.int16), 4).tolist()
    [0, -1, -1]
    """
    # The sign bit of |a| − threshold, spread; a comparison takes longer.
    return ~((accumulator.abs() - threshold) >> (8 * accumulator.itemsize - 1))


def flipped(values: Tensor, accumulator: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(T + sign(a) within {−1, 0, 1}, 0) where ``chosen`` is −1, and (T, a) where it is 0.

    >>> values, accumulator = (torch.tensor(each, dtype=torch.int8) for each in ([-1, 0, 1], [9, -9, 9]))
    >>> [each.tolist() for each in flipped(values, accumulator, reached(accumulator - 1, 8))]
    [[0, -1, 1], [0, 0, 0]]
    """
    move = (accumulator.sign() & chosen).to(values.dtype)
    return (values + move).clamp_(-1, 1), accumulator & ~chosen


def _take_in(tensors: tuple[Tensor, ...], first: int, key: Key, zero_pull: float, outward: Outward) -> Tensor:
    """a + v for a piece, with the pull toward zero among the votes."""
    values, accumulator, pending = tensors
    narrow = accumulator.dtype == pending.dtype == torch.int8
    votes = pending.to(torch.int16 if narrow else torch.int32)
    if zero_pull > 0:
        votes = votes + pull(values, zero_pull, uniform(key, places(values, first), _PULL))
    return accumulated(accumulator, votes, values, outward)


def _collect(
    tensors: tuple[Tensor, ...], first: int, word: int, other: int, zero_pull: float, outward: Outward
) -> None:
    accumulator = tensors[1]
    accumulator.copy_(_take_in(tensors, first, (word, other), zero_pull, outward))


def _collect_and_flip(
    tensors: tuple[Tensor, ...],
    first: int,
    word: int,
    other: int,
    zero_pull: float,
    outward: Outward,
    threshold: int,
) -> None:
    values, accumulator, _ = tensors
    total = _take_in(tensors, first, (word, other), zero_pull, outward)
    moved, left = flipped(values, total, reached(total, threshold))
    values.copy_(moved)
    accumulator.copy_(left)


def _flip_chosen(tensors: tuple[Tensor, ...], first: int) -> None:
    values, accumulator, chosen = tensors
    moved, left = flipped(values, accumulator, chosen)
    values.copy_(moved)
    accumulator.copy_(left)


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
    compiled: bool = False,
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
        compiled: run the elementwise part as one graph.
    """
    limit = torch.iinfo(accumulator.dtype).max
    flips = torch.zeros((), dtype=torch.int64, device=packed.device)
    how = (*key, zero_pull, outward)
    if threshold > limit:
        _pass(_collect, packed, (accumulator, pending), how, compiled, None)
    elif at_most is None:
        _pass(_collect_and_flip, packed, (accumulator, pending), (*how, threshold), compiled, flips)
    else:
        _pass(_collect, packed, (accumulator, pending), how, compiled, None)
        chosen = _choose(accumulator, threshold, at_most, key)
        _pass(_flip_chosen, packed, (accumulator, chosen), (), compiled, flips)
    return flips


def _pass(
    function: Callable[..., None],
    packed: Tensor,
    tensors: tuple[Tensor, ...],
    arguments: tuple[Any, ...],
    compiled: bool,
    flips: Tensor | None,
) -> None:
    """Call ``function`` with the unpacked weights and ``tensors``, piece by piece.

    ``flips`` counts the weights that it changed, which are packed again; None: it changes none.
    """
    rows, columns = tensors[0].shape
    for part in row_pieces(rows, columns, packed.device):
        values = unpack(packed[part], columns)
        cut = tuple(tensor[part] for tensor in tensors)
        in_pieces(function, (values, *cut), part.start * columns, arguments, compiled=compiled)
        if flips is not None:
            moved = pack(values)
            # One step takes no weight from −1 to 1, so the lower bit of its code changes if it moves at all.
            flips += low_bits(moved ^ packed[part])
            packed[part] = moved


def _choose(accumulator: Tensor, threshold: int, at_most: int, key: Key) -> Tensor:
    """Which of those with |a| ≥ threshold flip where only so many may: as :func:`reached`."""
    # Sorting candidates would take tens of bytes for each: they are counted by size, and those of the
    # one size that fits in part are counted by lot.
    sizes = torch.zeros(torch.iinfo(accumulator.dtype).max + 1, dtype=torch.int64, device=accumulator.device)
    in_pieces(_count_sizes, (accumulator,), 0, (sizes,), compiled=False)
    size, left = _cut(sizes[threshold:], at_most)
    size += threshold
    chosen = torch.empty_like(accumulator)
    in_pieces(_choose_above, (accumulator, chosen), 0, (size,), compiled=False)
    if left == 0:
        return chosen
    lots = torch.zeros(1 << _LOT_BITS, dtype=torch.int64, device=accumulator.device)
    in_pieces(_count_lots, (accumulator,), 0, (size, key, lots), compiled=False)
    lot, left = _cut(lots, left)
    rest: list[Tensor] = []
    in_pieces(_choose_lots, (accumulator, chosen), 0, (size, key, lot, rest), compiled=False)
    if left > 0:
        # Few have the same lot: one number to sort by, the whole of the noise and then the place.
        last = torch.cat(rest)
        order = (bits32(key, last, _TIES) >> 1 << 32) | last
        chosen.view(-1)[last[order.topk(left).indices]] = -1
    return chosen


def _cut(counts: Tensor, at_most: int) -> tuple[int, int]:
    """(bin, number): all above the bin and so many of it are at most this many; waits for the device.

    >>> _cut(torch.tensor([5, 3, 2, 0]), 4), _cut(torch.tensor([5, 3, 2, 0]), 10)
    ((1, 2), (-1, 0))
    """
    above = counts.flip(0).cumsum(0)
    whole = int((above <= at_most).sum())
    if whole == len(counts):
        return -1, 0
    return len(counts) - 1 - whole, at_most - (int(above[whole - 1]) if whole > 0 else 0)


def _count_sizes(tensors: tuple[Tensor, ...], first: int, counts: Tensor) -> None:
    counts += tensors[0].abs().bincount(minlength=len(counts))


def _choose_above(tensors: tuple[Tensor, ...], first: int, size: int) -> None:
    accumulator, chosen = tensors
    chosen.copy_(-(accumulator.abs() > size).view(torch.int8))


def _tied(accumulator: Tensor, first: int, size: int, key: Key) -> tuple[Tensor, Tensor]:
    """The places of a piece's elements with |a| = size, and their lots."""
    places = (accumulator.abs() == size).nonzero().view(-1) + first
    return places, bits32(key, places, _TIES) >> (32 - _LOT_BITS)


def _count_lots(tensors: tuple[Tensor, ...], first: int, size: int, key: Key, counts: Tensor) -> None:
    _, lots = _tied(tensors[0], first, size, key)
    counts += lots.bincount(minlength=len(counts))


def _choose_lots(
    tensors: tuple[Tensor, ...], first: int, size: int, key: Key, lot: int, rest: list[Tensor]
) -> None:
    """Choose those of a higher lot; those of the same are appended."""
    accumulator, chosen = tensors
    places, lots = _tied(accumulator, first, size, key)
    chosen[places[lots > lot] - first] = -1
    rest.append(places[lots == lot])
