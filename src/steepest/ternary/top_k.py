"""Pick which weights flip where more reach the threshold than may flip: the largest |a|, ties at random.

Usually few do. So the layer is searched for them word by word, and everything after works on indices alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from steepest.random import Key, bits32
from steepest.ternary.chunks import LARGE, in_chunks, row_chunks
from steepest.ternary.rows import WHOLE, Part
from steepest.ternary.swar import splat

__all__ = ["flip_top_k"]

# Stream of the noise that breaks ties.
_TIES = 1
# Ties are broken by this many random bits first.
_TIE_BITS = 16
# Indices are kept if there is at most one in this many weights: they take half a byte a weight, twice that
# while they are gathered.
_KEPT = 16


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
    part: Part = WHOLE,
) -> Tensor:
    """Move T one step toward sign(a), and a ← 0, for the ``at_most`` largest |a| ≥ threshold.

    Returns the number of flips, 0-dim int64. ``reached`` of the accumulator's counters have |a| ≥ threshold.
    ``compiled``: draw the noise by a compiled graph. The rest as in
    :func:`steepest.ternary.flipping.flip_layer`.
    """
    # A sort would take tens of bytes a candidate. Counting candidates by |a| finds the one size of which only
    # some may flip, and those are counted by random tie-breakers.
    counters = accumulator.view(-1)
    kept = _gathered(counters, threshold, reached)
    sized, most = counters if kept is None else counters[kept], torch.iinfo(counters.dtype).max
    chunks = row_chunks(sized.numel(), 1, sized.device)
    sizes = _histogram((sized[chunk].abs() for chunk in chunks), most + 1, sized.device)
    size, left = _cut(part.total(sizes[threshold:]), at_most)
    size += threshold
    if kept is None:
        kept = _gathered(counters, size, int(sizes[size:].sum()))
    flips = torch.zeros((), dtype=torch.int64, device=accumulator.device)
    for indices in _reaching(counters, size + 1, kept):
        flips += _flip(packed, accumulator, indices, bits)
    if left == 0:
        return flips
    # The counters above ``size`` are 0 by now.
    ties = (indices + part.first for indices in _reaching(counters, size, kept))
    draws = (_tie_breakers(places, key, compiled) for places in ties)
    bound, left = _cut(part.total(_histogram(draws, 1 << _TIE_BITS, counters.device)), left)
    rest = [counters.new_empty(0, dtype=torch.int64)]
    for indices in _reaching(counters, size, kept):
        drawn = _tie_breakers(indices + part.first, key, compiled)
        flips += _flip(packed, accumulator, indices[drawn > bound], bits)
        rest.append(indices[drawn == bound])
    if left > 0:
        # Few share a tie-breaker: sort them by one number, all bits of the noise and then the index.
        last = torch.cat(rest)
        places = last + part.first
        order = (bits32(key, places, _TIES) >> 1 << 32) | places
        lowest = part.of_all(order).topk(left).values[-1]
        flips += _flip(packed, accumulator, last[order >= lowest], bits)
    return flips


def _gathered(counters: Tensor, threshold: int, reached: int) -> Tensor | None:
    """Find the indices of the counters that reach a threshold, if they are few."""
    if reached * _KEPT > counters.numel():
        return None
    return torch.cat([counters.new_empty(0, dtype=torch.int64), *_reaching(counters, threshold)])


def _histogram(chunks: Iterable[Tensor], bins: int, device: torch.device) -> Tensor:
    counts = torch.zeros(bins, dtype=torch.int64, device=device)
    for chunk in chunks:
        counts += chunk.bincount(minlength=bins)
    return counts


def _cut(counts: Tensor, at_most: int) -> tuple[int, int]:
    """Find (bin, n): all above the bin, and n of the bin itself, are at most ``at_most``; a host sync."""
    above = counts.flip(0).cumsum(0)
    whole = int((above <= at_most).sum())
    if whole == len(counts):
        return -1, 0
    return len(counts) - 1 - whole, at_most - (int(above[whole - 1]) if whole > 0 else 0)


def _reaching(counters: Tensor, threshold: int, kept: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the indices, all or of those kept, with |a| ≥ threshold ≥ 1 at present, in chunks."""
    device = counters.device
    if kept is not None:
        for indices in (kept[part] for part in row_chunks(len(kept), 1, device)):
            yield indices[counters[indices].abs() > threshold - 1]
        return
    numbers, width = 8 // counters.itemsize, 8 * counters.itemsize
    high = splat(1 << (width - 1), width)
    for part in row_chunks(counters.numel(), 1, device, LARGE):
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
