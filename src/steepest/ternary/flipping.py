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
    chosen = (accumulator.abs() >= threshold).view(torch.int8)
    places = chosen.view(-1).nonzero().view(-1)
    if len(places) > at_most:
        sizes = accumulator.view(-1)[places].abs().to(torch.int64)
        # One number to sort by: |a|, then the lot, then the place, so that no two are equal.
        order = (sizes << 48) | ((bits32(key, places, _TIES) >> 16) << 32) | places
        kept = places[order.topk(at_most).indices]
        chosen.zero_()
        chosen.view(-1)[kept] = 1
    return (-chosen).to(accumulator.dtype)
