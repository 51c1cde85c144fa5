"""A layer's step: votes go into the accumulator, and where it is full the weight moves by one."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from steepest.random import Key, bits32, uniform
from steepest.ternary.ballot import Outward
from steepest.ternary.packing import unpack
from steepest.ternary.pieces import in_pieces, places, row_pieces
from steepest.ternary.planes import run_pass

__all__ = ["flip_layer", "pull"]

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
    # By way of floats, of which torch's compiler makes vector code.
    return -(values * (u < chance).to(u.dtype)).to(values.dtype)


def _pull_in(tensors: tuple[Tensor, ...], first: int, word: int, other: int, chance: float) -> None:
    pending, values = tensors
    pending += pull(values, chance, uniform((word, other), places(values, first), _PULL))


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
        pending: the sum of the step's votes, integers [out, in], with room for one more if there is a pull;
            what is left in it means nothing. Beyond ±32767 it saturates.
        threshold: flip where |a| is at least this.
        outward: ``"cancel"``: at a bound, a stops at 0 where it would point outward.
        zero_pull: probability of a vote toward 0.
        at_most: flip no more than this many: the largest |a| first, ties by lot. None: no bound. (Counting
            them waits for the device.)
        key: of the noise.
        compiled: by graphs, but for a choice among too many and what comes of it.
    """
    if pending.dtype not in (torch.int8, torch.int16):
        limit = torch.iinfo(torch.int16).max
        pending = pending.clamp(-limit, limit).to(torch.int16)
    if zero_pull > 0:
        _pull_all(packed, pending, zero_pull, key, compiled)
    run = functools.partial(run_pass, threshold=threshold, cancel=outward == "cancel", compiled=compiled)
    out_of_reach = threshold > torch.iinfo(accumulator.dtype).max
    if at_most is None and not out_of_reach:
        return run("flip", packed, accumulator, pending)
    reached = run("collect", packed, accumulator, pending)
    if out_of_reach:
        return torch.zeros_like(reached)
    assert at_most is not None
    if int(reached) <= at_most:
        return run("flip", packed, accumulator, pending.zero_())
    # Choosing takes so much longer that a graph for this would not be earned back.
    return run_pass(
        "settle", packed, accumulator, _choose(accumulator, threshold, at_most, key), compiled=False
    )


def _pull_all(packed: Tensor, pending: Tensor, chance: float, key: Key, compiled: bool) -> None:
    """Add the votes toward 0."""
    rows, columns = pending.shape
    for part in row_pieces(rows, columns, packed.device):
        tensors = (pending[part], unpack(packed[part], columns))
        in_pieces(_pull_in, tensors, part.start * columns, (*key, chance), compiled=compiled)


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
