"""Sum a gradient's elements and their squares as integers, so that no order and no cut changes the sum.

With μ = max|x| of the whole tensor, 2^(e−1) ≤ μ < 2^e, d elements and b = min(62 − ⌈log₂ d⌉, 50)::

    Σx = 2^(e−b) Σ round(x·2^(b−e))        Σx² = 2^(2e−b) Σ round(x²·2^(b−2e))

The sums on the right are int64 and cannot overflow. Adding the *anchor* 1.5·2^52 units in float64, where a
unit is 2^(e−b) or 2^(2e−b), rounds to whole units: taken as int64, the bits of the result are those of the
anchor plus the number of units. The anchors' bits are subtracted in the end, since integers wrap around.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from steepest.distributed.reduce import reduce_over_shards
from steepest.engine.compiled_sums import sum_squares_compiled
from steepest.engine.layout import Row, chunks_of, flat
from steepest.engine.multi_tensor import SMALL
from steepest.rule import Moments

__all__ = ["Summand", "moments", "working_bytes"]

# A float64 copy of a chunk, half a MiB, fits the L2 cache. Accelerators need fewer launches.
_CHUNK_ON_CPU = 1 << 16
_CHUNK_ELSEWHERE = 1 << 22

# float64: bits of the fraction, the exponent's bias, and the exponent field of infinity.
_FRACTION = 52
_BIAS = 1023
_INFINITE = 2047


class Summand(NamedTuple):
    """A gradient to sum.

    Attributes:
        grad: real, and this process's shard if ``owner`` is a DTensor.
        owner: the whole tensor; the gradient itself, or what it is the gradient of.
        total: whether the sum of the elements is needed besides that of the squares.
        compiled: whether to sum the squares with compiled code, where it can be compiled.
        joins: whether it may be joined with other small ones; what a graph captures may not.
    """

    grad: Tensor
    owner: Tensor
    total: bool = True
    compiled: bool = False
    joins: bool = True


class _Sum(NamedTuple):
    at: int
    power: int


def moments(summands: Sequence[Summand]) -> list[Moments]:
    """Return the moments of whole tensors, of which this process may have shards.

    They are equal, bit for bit, on all processes, and however the tensors are sharded. Where an element is
    infinite or NaN, or a sum exceeds float64, the sum is NaN.

    >>> grad = torch.tensor([3.0, 4.0])
    >>> [(count, total, square)] = moments([Summand(grad, grad)])
    >>> count, total.item(), square.item()
    (2, 7.0, 25.0)
    """
    found: dict[int, Moments] = {}
    by_device: dict[torch.device, list[int]] = {}
    for at, summand in enumerate(summands):
        by_device.setdefault(summand.grad.device, []).append(at)
    for device, places in by_device.items():
        here = [summands[at] for at in places]
        # Apple's GPUs have no float64.
        made = [_in_float32(each) for each in here] if device.type == "mps" else _moments(here, device)
        found.update(zip(places, made, strict=True))
    return [found[at] for at in range(len(summands))]


def _moments(summands: list[Summand], device: torch.device) -> list[Moments]:
    owners = [each.owner for each in summands]
    counts = [owner.numel() * (1 + owner.is_complex()) for owner in owners]
    sums = [_Sum(at, power) for at, each in enumerate(summands) for power in ((1, 2) if each.total else (2,))]
    small = _small(summands)
    largest = _largest([each.grad for each in summands], small)
    # An all-reduce may lose NaN.
    largest = torch.where(largest.isnan(), torch.inf, largest)
    largest = reduce_over_shards(largest, owners, "MAX")
    if len(sums) > len(summands):
        each = largest.unbind()
        largest = torch.stack([each[at] for at, _ in sums])
    powers = _integers([power for _, power in sums], device)
    exponents = torch.frexp(largest).exponent.to(torch.int64) * powers
    bits = _integers([min(62 - max(counts[at] - 1, 0).bit_length(), 50) for at, _ in sums], device)
    # The anchors' exponent fields. The smallest allowed one gives the smallest normal unit.
    fields = exponents + (_BIAS + _FRACTION) - bits
    known = largest.isfinite() & (fields < _INFINITE)
    fields.clamp_(_FRACTION + 1, _INFINITE - 1)
    anchors = (fields << _FRACTION) | (1 << (_FRACTION - 1))
    units = ((fields - _FRACTION) << _FRACTION).view(torch.float64)
    raw = _raw_sums(summands, sums, anchors.view(torch.float64), small)
    whole = raw - anchors * _integers([summands[at].grad.numel() for at, _ in sums], device)
    whole = reduce_over_shards(whole, [owners[at] for at, _ in sums], "SUM")
    values = dict(zip(sums, torch.where(known, whole * units, torch.nan).unbind(), strict=True))
    unknown = torch.full((), torch.nan, dtype=torch.float64, device=device)
    return [
        Moments(count, values.get(_Sum(at, 1), unknown), values[_Sum(at, 2)])
        for at, count in enumerate(counts)
    ]


def _small(summands: list[Summand]) -> frozenset[int]:
    """Return which gradients are joined: on a CPU, each operation takes longer than their elements."""
    found = []
    for at, (grad, *_, joins) in enumerate(summands):
        if joins and grad.is_cpu and 0 < grad.numel() <= SMALL and grad.is_contiguous():
            found.append(at)
    return frozenset(found if len(found) > 1 else ())


def _joined(grads: list[Tensor], places: Sequence[int]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield some of the places, their gradients end to end in float64, and their lengths."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for place in places:
        by_dtype.setdefault(grads[place].dtype, []).append(place)
    for alike in by_dtype.values():
        while alike:
            ends = accumulate(grads[place].numel() for place in alike)
            # Four values of eight bytes for each element.
            count = max(1, sum(1 for _ in takewhile(lambda end: end <= _CHUNK_ON_CPU // 4, ends)))
            some, alike = alike[:count], alike[count:]
            wide = torch.cat([grads[place].view(-1) for place in some]).to(torch.float64)
            lengths = torch.tensor([grads[place].numel() for place in some], device="cpu")
            yield some, wide, lengths


def _largest(grads: list[Tensor], small: frozenset[int]) -> Tensor:
    """Return the largest magnitude of each gradient in float64; NaN if it contains NaN."""
    found: dict[int, Tensor] = {}
    for some, wide, lengths in _joined(grads, sorted(small)):
        largest = torch.segment_reduce(wide.abs_(), "max", lengths=lengths)
        found.update(zip(some, largest.unbind(), strict=True))
    rest = [at for at in range(len(grads)) if at not in small]
    if rest:
        extremes = torch.stack([extreme for at in rest for extreme in _extremes(grads[at])])
        largest = extremes.to(torch.float64).abs_().view(-1, 2).amax(1)
        found.update(zip(rest, largest.unbind(), strict=True))
    return torch.stack([found[at] for at in range(len(grads))])


def _extremes(grad: Tensor) -> tuple[Tensor, Tensor]:
    if grad.numel() == 0:
        return grad.new_zeros(()), grad.new_zeros(())
    if grad.is_contiguous():
        return grad.aminmax()
    # aminmax would copy others.
    dense = flat([grad], ordered=False)
    if dense is not None:
        return dense[0].aminmax()
    return torch.stack([extreme for chunk in _chunks(grad) for extreme in chunk.aminmax()]).aminmax()


def _raw_sums(
    summands: list[Summand], sums: list[_Sum], anchors_of_all: Tensor, small: frozenset[int]
) -> Tensor:
    """Return the int64 sums of rounded elements or squares; each element includes the anchor's bits."""
    anchors = anchors_of_all.unbind()
    places = [place for place, (at, power) in enumerate(sums) if power == 2 and summands[at].compiled]
    given = [summands[sums[place].at].grad for place in places]
    made = sum_squares_compiled(given, [anchors[place] for place in places]) if places else {}
    found = {places[at]: value for at, value in made.items()}
    rest = [place for place in range(len(sums)) if place not in found]
    joined = [place for place in rest if sums[place].at in small]
    given = [summands[at].grad for at, _ in sums]
    for power in (1, 2):
        alike = [place for place in joined if sums[place].power == power]
        for some, wide, lengths in _joined(given, alike):
            if power == 2:
                wide.mul_(wide)
            wide.add_(anchors_of_all[some].repeat_interleave(lengths, output_size=len(wide)))
            # Integers wrap around, so that differences of running sums are exact.
            running = wide.view(torch.int64).cumsum(0)[lengths.cumsum(0) - 1]
            found.update(zip(some, running.diff(prepend=running.new_zeros(1)).unbind(), strict=True))
    rest = [place for place in rest if place not in found]
    if rest:
        device = anchors[0].device
        longest = max([summands[sums[place].at].grad.numel() for place in rest])
        wide = torch.empty(min(longest, _chunk_length(device)), dtype=torch.float64, device=device)
        for place in rest:
            at, power = sums[place]
            found[place] = _raw_sum(summands[at].grad, power, anchors[place], wide)
    return torch.stack([found[place] for place in range(len(sums))])


def _raw_sum(grad: Tensor, power: int, anchor: Tensor, wide: Tensor) -> Tensor:
    """Return one sum, with ``wide`` as working memory."""
    found = []
    for chunk in _chunks(grad):
        part = wide[: chunk.numel()]
        part.view(chunk.shape).copy_(chunk)
        if power == 2:
            # Not fused with the sum, which may round otherwise at the end of a chunk.
            part.mul_(part)
        part.add_(anchor)
        found.append(part.view(torch.int64).sum())
    if len(found) == 1:
        return found[0]
    return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.int64, device=grad.device)


def _chunks(grad: Tensor) -> Iterator[Tensor]:
    limit = _chunk_length(grad.device)
    if 0 < grad.numel() <= limit:
        yield grad
        return
    for (chunk,), _ in chunks_of(Row([grad], {}), limit, ordered=False):
        yield chunk


def working_bytes(numel: int, device: torch.device) -> int:
    """Return the bytes of working memory that summing a gradient of ``numel`` elements takes, eagerly."""
    return torch.float64.itemsize * min(numel, _chunk_length(device))


def _chunk_length(device: torch.device) -> int:
    return _CHUNK_ON_CPU if device.type == "cpu" else _CHUNK_ELSEWHERE


def _integers(values: Sequence[int], device: torch.device) -> Tensor | int:
    """Return integers as a tensor, or one that they all are.

    Nothing is copied from the host, which a CUDA graph forbids.
    """
    if len(set(values)) == 1:
        return values[0]
    made = {value: torch.full((), value, dtype=torch.int64, device=device) for value in set(values)}
    return torch.stack([made[value] for value in values])


def _in_float32(summand: Summand) -> Moments:
    grad = summand.grad
    total, square = torch.zeros(2, dtype=torch.float32, device=grad.device).unbind()
    for chunk in _chunks(grad):
        wide = chunk.to(torch.float32)
        total += wide.sum()
        square += (wide * wide).sum()
    return Moments(grad.numel(), total, square)
