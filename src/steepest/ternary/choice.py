"""Which weights flip where the votes suffice for more than may: the largest |a|, ties by lot.

Few have the votes, as a rule, and fewer may flip. So a layer is looked through in words for those that might,
and all that follows is about their places alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from steepest.random import Key, bits32
from steepest.ternary.pieces import flat_pieces, in_pieces
from steepest.ternary.words import splat

__all__ = ["flip_first"]

# The stream of the step's noise.
_TIES = 1
# Ties are told apart by so many bits first.
_LOT_BITS = 16
# Of fewer ties than one in so many weights, places and lots are kept: a byte a weight.
_KEPT = 16
_BYTES = 8


def flip_first(
    packed: Tensor, accumulator: Tensor, *, threshold: int, at_most: int, key: Key, compiled: bool
) -> Tensor:
    """T ← T + sign(a) within {−1, 0, 1}, a ← 0 for those with |a| ≥ threshold who come first.

    Args:
        packed: T, uint8 [out, ⌈in/4⌉].
        accumulator: a, int8 or int16 [out, in], contiguous.
        threshold: τ.
        at_most: this many at most.
        key: of the noise.
        compiled: that of the lots.

    Returns:
        The number of flips, 0-dim int64.
    """
    # Sorting all would take tens of bytes for each: they are counted by size, and those of the one size that
    # fits in part are counted by lot.
    sizes = torch.zeros(torch.iinfo(accumulator.dtype).max + 1, dtype=torch.int64, device=accumulator.device)
    in_pieces(_count_sizes, (accumulator,), 0, (sizes,), compiled=False)
    size, left = _cut(sizes[threshold:], at_most)
    size += threshold
    flips = torch.zeros((), dtype=torch.int64, device=accumulator.device)
    for places in _reaching(accumulator, size + 1):
        flips += _flip(packed, accumulator, places)
    if left == 0:
        return flips
    few = int(sizes[size]) * _KEPT <= accumulator.numel()
    # Those above are 0 by now.
    ties: Iterable[tuple[Tensor, Tensor]] | None
    ties = list(_drawn(accumulator, size, key, compiled)) if few else None
    counts = torch.zeros(1 << _LOT_BITS, dtype=torch.int64, device=accumulator.device)
    for _, lots in ties or _drawn(accumulator, size, key, compiled):
        counts += lots.bincount(minlength=len(counts))
    lot, left = _cut(counts, left)
    rest = []
    for places, lots in ties or _drawn(accumulator, size, key, compiled):
        flips += _flip(packed, accumulator, places[lots > lot])
        rest.append(places[lots == lot])
    if left > 0:
        # Few have the same lot: one number to sort by, the whole of the noise and then the place.
        last = torch.cat(rest)
        order = (bits32(key, last, _TIES) >> 1 << 32) | last
        flips += _flip(packed, accumulator, last[order.topk(left).indices])
    return flips


def _count_sizes(tensors: tuple[Tensor, ...], first: int, counts: Tensor) -> None:
    counts += tensors[0].abs().bincount(minlength=len(counts))


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


def _reaching(accumulator: Tensor, threshold: int) -> Iterator[Tensor]:
    """The places with |a| ≥ threshold ≥ 1, int64, a piece of the layer at a time."""
    numbers, width = _BYTES // accumulator.itemsize, 8 * accumulator.itemsize
    high = splat(1 << (width - 1), width)
    flat = accumulator.view(-1)
    for part in flat_pieces(flat.numel(), flat.device):
        # Below 0 where it is reached: comparing bytes takes ten times as long.
        below = threshold - 1 - flat[part].abs()
        if spare := -below.numel() % numbers:
            below = torch.nn.functional.pad(below, (0, spare))
        hits = (below.view(torch.int64) & high).nonzero().view(-1)
        word, lane = (below.view(-1, numbers)[hits] < 0).nonzero().unbind(1)
        yield hits[word] * numbers + lane + part.start


def _drawn(
    accumulator: Tensor, size: int, key: Key, compiled: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """The places with |a| ≥ size, and their lots."""
    for places in _reaching(accumulator, size):
        lots = torch.empty_like(places)
        in_pieces(_draw, (places, lots), 0, key, compiled=compiled)
        yield places, lots


def _draw(tensors: tuple[Tensor, ...], first: int, word: int, other: int) -> None:
    places, lots = tensors
    lots.copy_(bits32((word, other), places, _TIES) >> (32 - _LOT_BITS))


def _flip(packed: Tensor, accumulator: Tensor, places: Tensor) -> Tensor:
    """Move weights by their counters, wherever they are; the number that moved."""
    counters, columns, width = accumulator.view(-1), accumulator.shape[1], packed.shape[1]
    row = places // columns
    column = places - row * columns
    plane = column // width
    at, shift = (row, column - plane * width), 2 * plane
    # The code is two's complement, of 2 bits.
    code = (packed[at].to(torch.int64) >> shift) & 3
    values = (code ^ 2) - 2
    moved = (values + counters[places].sign()).clamp(-1, 1)
    # Weights may share a byte: what is added to it for each stays within the byte, all in all.
    packed.index_put_(at, (((moved & 3) - code) << shift).to(torch.uint8), accumulate=True)
    counters[places] = 0
    return (moved != values).sum()
