"""Which weights flip where the votes suffice for more than may: the largest |a|, ties by lot.

Few have the votes, as a rule, and fewer may flip. So a layer is looked through in words for those that might,
and all that follows is about their places alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from steepest.random import Key, bits32
from steepest.ternary.chunks import flat_pieces, in_pieces
from steepest.ternary.swar import splat

__all__ = ["flip_first"]

# The stream of the step's noise.
_TIES = 1
# Ties are told apart by so many bits first.
_LOT_BITS = 16
# The places of at most one in so many weights are kept: half a byte a weight, and as much again while they
# are gathered.
_KEPT = 16
# A piece is looked through with few calls, so it may be large.
_PIECE = 4
_BYTES = 8


def flip_first(
    packed: Tensor,
    accumulator: Tensor,
    *,
    threshold: int,
    reached: int,
    at_most: int,
    key: Key,
    compiled: bool,
) -> Tensor:
    """T ← T + sign(a) within {−1, 0, 1}, a ← 0 for those with |a| ≥ threshold who come first.

    Args:
        packed: T, uint8 [out, ⌈in/4⌉].
        accumulator: a, int8 or int16 [out, in], contiguous.
        threshold: τ.
        reached: how many have |a| ≥ τ.
        at_most: this many at most.
        key: of the noise.
        compiled: that of the lots.

    Returns:
        The number of flips, 0-dim int64.
    """
    # Sorting all would take tens of bytes for each: they are counted by size, and those of the one size that
    # fits in part are counted by lot.
    candidates = _Candidates(accumulator.view(-1), threshold, reached)
    sizes = candidates.sizes()
    size, left = _cut(sizes[threshold:], at_most)
    size += threshold
    candidates = candidates.narrowed(size, int(sizes[size:].sum()))
    flips = torch.zeros((), dtype=torch.int64, device=accumulator.device)
    for places in candidates.reaching(size + 1):
        flips += _flip(packed, accumulator, places)
    if left == 0:
        return flips
    # Those above are 0 by now.
    counts = torch.zeros(1 << _LOT_BITS, dtype=torch.int64, device=accumulator.device)
    for places in candidates.reaching(size):
        counts += _lots(places, key, compiled).bincount(minlength=len(counts))
    lot, left = _cut(counts, left)
    rest = []
    for places in candidates.reaching(size):
        lots = _lots(places, key, compiled)
        flips += _flip(packed, accumulator, places[lots > lot])
        rest.append(places[lots == lot])
    if left > 0:
        # Few have the same lot: one number to sort by, the whole of the noise and then the place.
        last = torch.cat(rest)
        order = (bits32(key, last, _TIES) >> 1 << 32) | last
        flips += _flip(packed, accumulator, last[order.topk(left).indices])
    return flips


class _Candidates:
    """The places of those who reach a threshold: kept where they are few, else looked for every time."""

    def __init__(self, counters: Tensor, threshold: int, reached: int) -> None:
        self._counters = counters
        few = reached * _KEPT <= self._counters.numel()
        self._kept = torch.cat([*_reaching(self._counters, threshold)]) if few else None

    def sizes(self) -> Tensor:
        """How many there are of each |a|; below the threshold, any number."""
        counters = self._counters if self._kept is None else self._counters[self._kept]
        most = torch.iinfo(counters.dtype).max
        counts = torch.zeros(most + 1, dtype=torch.int64, device=counters.device)
        for part in flat_pieces(counters.numel(), counters.device):
            counts += counters[part].abs().bincount(minlength=len(counts))
        return counts

    def narrowed(self, threshold: int, reached: int) -> _Candidates:
        """As many, or those alone who reach a higher threshold."""
        return _Candidates(self._counters, threshold, reached) if self._kept is None else self

    def reaching(self, threshold: int) -> Iterable[Tensor]:
        """The places with |a| ≥ this one, as it is now, in parts."""
        if self._kept is None:
            return _reaching(self._counters, threshold)
        parts = (self._kept[part] for part in flat_pieces(len(self._kept), self._kept.device))
        return (places[self._counters[places].abs() > threshold - 1] for places in parts)


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


def _reaching(counters: Tensor, threshold: int) -> Iterator[Tensor]:
    """The places with |a| ≥ threshold ≥ 1, int64, a piece of the layer at a time."""
    numbers, width = _BYTES // counters.itemsize, 8 * counters.itemsize
    high = splat(1 << (width - 1), width)
    for part in flat_pieces(counters.numel(), counters.device, _PIECE):
        # Below 0 where it is reached: comparing bytes takes ten times as long.
        below = threshold - 1 - counters[part].abs()
        if spare := -below.numel() % numbers:
            below = torch.nn.functional.pad(below, (0, spare))
        hits = (below.view(torch.int64) & high).nonzero().view(-1)
        word, lane = (below.view(-1, numbers)[hits] < 0).nonzero().unbind(1)
        yield hits[word] * numbers + lane + part.start


def _lots(places: Tensor, key: Key, compiled: bool) -> Tensor:
    lots = torch.empty_like(places)
    in_pieces(_draw, (places, lots), 0, key, compiled=compiled)
    return lots


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
