"""Pick which weights flip where more reach the threshold than may flip: the largest |a|, ties at random.

Usually few weights reach the threshold, and fewer may flip. So the layer is searched word by word for the
candidates, and everything after that works on their indices alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from steepest.random import Key, bits32
from steepest.ternary.chunks import flat_chunks, in_chunks
from steepest.ternary.swar import splat

__all__ = ["flip_top_k"]

# Stream of the noise that breaks ties.
_TIES = 1
# Ties are broken by this many random bits first.
_TIE_BITS = 16
# Indices are kept if there is at most one in this many weights: they take half a byte a weight, twice that
# while they are gathered.
_KEPT = 16
# Searching makes few calls a chunk, so chunks may be larger than usual.
_LARGE = 4
_BYTES = 8


def flip_top_k(
    packed: Tensor,
    accumulator: Tensor,
    *,
    bits: int = 2,
    threshold: int,
    reached: int,
    at_most: int,
    key: Key,
    compiled: bool,
) -> Tensor:
    """Move T one step toward sign(a), and a ← 0, for the ``at_most`` largest |a| ≥ threshold.

    Args:
        packed: T, uint8 [out, bytes of a row].
        accumulator: a, int8 or int16 [out, in], contiguous.
        bits: of a packed weight, 2 (ternary) or 1 (binary).
        threshold: τ.
        reached: the number of counters with |a| ≥ τ.
        at_most: the largest number of flips.
        key: of the noise that breaks ties.
        compiled: whether to draw the noise by a compiled graph.

    Returns:
        The number of flips, 0-dim int64.
    """
    # A sort would take tens of bytes a candidate. Counting candidates by |a| finds the one size of which only
    # some may flip, and those are counted by random tie-breakers.
    candidates = _Candidates(accumulator.view(-1), threshold, reached)
    sizes = candidates.count_sizes()
    size, left = _cut(sizes[threshold:], at_most)
    size += threshold
    candidates = candidates.narrowed(size, int(sizes[size:].sum()))
    flips = torch.zeros((), dtype=torch.int64, device=accumulator.device)
    for indices in candidates.reaching(size + 1):
        flips += _flip(packed, accumulator, indices, bits)
    if left == 0:
        return flips
    # The counters above ``size`` are 0 by now.
    counts = torch.zeros(1 << _TIE_BITS, dtype=torch.int64, device=accumulator.device)
    for indices in candidates.reaching(size):
        counts += _tie_breakers(indices, key, compiled).bincount(minlength=len(counts))
    bound, left = _cut(counts, left)
    rest = []
    for indices in candidates.reaching(size):
        drawn = _tie_breakers(indices, key, compiled)
        flips += _flip(packed, accumulator, indices[drawn > bound], bits)
        rest.append(indices[drawn == bound])
    if left > 0:
        # Few share a tie-breaker: sort them by one number, all bits of the noise and then the index.
        last = torch.cat(rest)
        order = (bits32(key, last, _TIES) >> 1 << 32) | last
        flips += _flip(packed, accumulator, last[order.topk(left).indices], bits)
    return flips


class _Candidates:
    """Indices of the counters that reach a threshold: kept if they are few, else searched for every time."""

    def __init__(self, counters: Tensor, threshold: int, reached: int) -> None:
        self._counters = counters
        few = reached * _KEPT <= self._counters.numel()
        self._kept = torch.cat([*_reaching(self._counters, threshold)]) if few else None

    def count_sizes(self) -> Tensor:
        """Count the candidates of each |a|; counts below the threshold are meaningless."""
        counters = self._counters if self._kept is None else self._counters[self._kept]
        most = torch.iinfo(counters.dtype).max
        counts = torch.zeros(most + 1, dtype=torch.int64, device=counters.device)
        for part in flat_chunks(counters.numel(), counters.device):
            counts += counters[part].abs().bincount(minlength=len(counts))
        return counts

    def narrowed(self, threshold: int, reached: int) -> _Candidates:
        """Return the candidates of a higher threshold, unless these are few already."""
        return _Candidates(self._counters, threshold, reached) if self._kept is None else self

    def reaching(self, threshold: int) -> Iterable[Tensor]:
        """Yield the indices with |a| ≥ this threshold at present, in chunks."""
        if self._kept is None:
            return _reaching(self._counters, threshold)
        chunks = (self._kept[part] for part in flat_chunks(len(self._kept), self._kept.device))
        return (indices[self._counters[indices].abs() > threshold - 1] for indices in chunks)


def _cut(counts: Tensor, at_most: int) -> tuple[int, int]:
    """Find (bin, n): all above the bin, and n of the bin itself, are at most ``at_most``; a host sync.

    >>> _cut(torch.tensor([5, 3, 2, 0]), 4), _cut(torch.tensor([5, 3, 2, 0]), 10)
    ((1, 2), (-1, 0))
    """
    above = counts.flip(0).cumsum(0)
    whole = int((above <= at_most).sum())
    if whole == len(counts):
        return -1, 0
    return len(counts) - 1 - whole, at_most - (int(above[whole - 1]) if whole > 0 else 0)


def _reaching(counters: Tensor, threshold: int) -> Iterator[Tensor]:
    """Yield the int64 indices with |a| ≥ threshold ≥ 1, one chunk of the layer at a time."""
    numbers, width = _BYTES // counters.itemsize, 8 * counters.itemsize
    high = splat(1 << (width - 1), width)
    for part in flat_chunks(counters.numel(), counters.device, _LARGE):
        # Negative where the threshold is reached: comparing bytes takes ten times as long.
        below = threshold - 1 - counters[part].abs()
        if spare := -below.numel() % numbers:
            below = torch.nn.functional.pad(below, (0, spare))
        hits = (below.view(torch.int64) & high).nonzero().view(-1)
        word, field = (below.view(-1, numbers)[hits] < 0).nonzero().unbind(1)
        yield hits[word] * numbers + field + part.start


def _tie_breakers(indices: Tensor, key: Key, compiled: bool) -> Tensor:
    drawn = torch.empty_like(indices)
    in_chunks(_draw, (indices, drawn), 0, key, compiled=compiled)
    return drawn


def _draw(tensors: tuple[Tensor, ...], first: int, word: int, other: int) -> None:
    indices, drawn = tensors
    drawn.copy_(bits32((word, other), indices, _TIES) >> (32 - _TIE_BITS))


def _flip(packed: Tensor, accumulator: Tensor, indices: Tensor, bits: int) -> Tensor:
    """Move the weights at these indices by their counters, and count those that moved."""
    counters, columns, width = accumulator.view(-1), accumulator.shape[1], packed.shape[1]
    row = indices // columns
    column = indices - row * columns
    plane = column // width
    at, shift = (row, column - plane * width), bits * plane
    code = (packed[at].to(torch.int64) >> shift) & ((1 << bits) - 1)
    signs = counters[indices].sign()
    # Ternary codes are two's complement of 2 bits, binary ones the sign.
    moved = ((code ^ 2) - 2 + signs).clamp(-1, 1) & 3 if bits == 2 else (signs < 0).to(torch.int64)
    # Weights may share a byte: the sum of what they add to it stays within the byte.
    packed.index_put_(at, ((moved - code) << shift).to(torch.uint8), accumulate=True)
    counters[indices] = 0
    return (moved != code).sum()
