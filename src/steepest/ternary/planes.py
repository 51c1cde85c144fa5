"""Update a layer's packed weights and counters in one sweep over memory, 64 bits at a time.

A byte of packed ternary weights holds four that are a quarter of a row apart
(:mod:`steepest.ternary.packing`). A quarter of a row of counters is a *plane*. Its words line up with the
packed bytes, so the pass reads one word of packed weights and one word of each plane.

A byte of binary weights holds eight. Its halves are taken apart first, so that a row becomes two rows of four
planes each and the same loop serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steepest.compile.dynamic import run_dynamic, trial_matrix, trial_planes
from steepest.ternary import swar
from steepest.ternary.chunks import MOVES_WEIGHTS, row_chunks
from steepest.ternary.swar import INT8, INT16, Fields

__all__ = ["run_pass"]

_PLANES = 4
_WORD_BYTES = 8

Kind = Literal["flip", "accumulate"]


@dataclass(frozen=True)
class PassConfig:
    """What one compiled graph is specialized for.

    Attributes:
        kind: ``"flip"`` or ``"accumulate"``, the function of :mod:`steepest.ternary.swar`.
        bits: of a packed weight, 2 or 1.
        fields: of the counters.
        widen: whether votes are int8 and counters int16.
        cancel: whether counters stop at 0 where the weight is at its bound.
    """

    kind: Kind
    bits: int
    fields: Fields
    widen: bool
    cancel: bool

    @property
    def packed_dtype(self) -> torch.dtype:
        """Dtype of words of packed weights, one for each word of counters."""
        return torch.int64 if self.fields == INT8 else torch.int32

    @property
    def votes_dtype(self) -> torch.dtype:
        """Dtype of words of votes."""
        return torch.int32 if self.widen else torch.int64


class Words(NamedTuple):
    """Some rows as words.

    Attributes:
        packed: packed weights [rows, words], to be changed.
        codes: the same; of binary weights a copy [2·rows, words] that has four bits of each byte.
        counters, votes: [len(codes), planes, words].
    """

    packed: Tensor
    codes: Tensor
    counters: Tensor
    votes: Tensor


def run_pass(
    kind: Kind,
    packed: Tensor,
    accumulator: Tensor,
    votes: Tensor,
    *,
    bits: int = 2,
    threshold: int,
    cancel: bool,
    compiled: bool,
) -> Tensor:
    """Run a pass over a layer, in place.

    Args:
        kind: ``"flip"`` adds the votes and flips; ``"accumulate"`` only adds them.
        packed: T, uint8 [out, bytes of a row].
        accumulator: a, int8 or int16 [out, in].
        votes: int8 or int16 [out, in]; destroyed.
        bits: of a packed weight, 2 (ternary) or 1 (binary).
        threshold: τ; for ``"flip"`` at most the largest value of a's dtype.
        cancel: at a bound, set a to 0 where it would point outward.
        compiled: run a compiled graph.

    Returns:
        The number of flips, or for ``"accumulate"`` of counters with |a| ≥ τ; 0-dim int64.
    """
    rows, columns = accumulator.shape
    fields = INT8 if accumulator.dtype == votes.dtype == torch.int8 else INT16
    # Eagerly, converting the votes beforehand is faster than widening them within the pass.
    widen = compiled and fields == INT16 and votes.dtype == torch.int8
    config = PassConfig(kind, bits, fields, widen, cancel)
    # An int8 counter with int16 votes is computed as int16, then clamped to int8's limits.
    fits = accumulator.dtype == fields.dtype
    limit = torch.iinfo(accumulator.dtype).max
    slack = torch.tensor(fields.slack(min(threshold, fields.limit + 1)), device=packed.device)
    aligned = fits and _is_aligned(config, packed, accumulator, votes)
    count = torch.zeros((), dtype=torch.int64, device=packed.device)
    # A compiled graph allocates nothing of the layer's size, so it takes all rows at once.
    chunks = [slice(0, rows)] if aligned and compiled else row_chunks(rows, columns, packed.device)
    for chunk in chunks:
        mine = packed[chunk], accumulator[chunk], votes[chunk].to(torch.int8 if widen else fields.dtype)
        words = _view(config, *mine) if aligned else _padded(config, *mine)
        count += _run(config, words, slack, compiled)
        if kind == "flip":
            changes = words.votes[:, 0].to(config.packed_dtype)
            words.packed.bitwise_xor_(_join_halves(changes) if bits == 1 else changes)
        if not aligned:
            _copy_back(mine[0], words.packed.view(torch.uint8))
            counters = words.counters.view(fields.dtype)
            counters = counters if fits else counters.clamp(-limit, limit)
            counters = counters.view(len(mine[1]), -1, counters.shape[-1])
            for index, plane in _planes(mine[1], packed.shape[1]):
                _copy_back(plane, counters[:, index])
    return count


def _run(config: PassConfig, words: Words, slack: Tensor, compiled: bool) -> Tensor:
    """Run a pass over words in place and return the count.

    The bits of ``codes`` that change are left in the first plane of ``votes``.
    """
    # torch.compile specializes on the size 1.
    if not compiled or 1 in words.codes.shape:
        return _all_planes(config, words, slack)

    def sweep(codes: Tensor, counters: list[Tensor], votes: list[Tensor], slack: Tensor) -> Tensor:
        return _plane_by_plane(config, codes, counters, votes, slack)

    device = words.codes.device
    arguments = words.codes, list(words.counters.unbind(1)), list(words.votes.unbind(1)), slack
    return run_dynamic((config, device), sweep, arguments, MOVES_WEIGHTS, lambda: _trial(config, device))


def _all_planes(config: PassConfig, words: Words, slack: Tensor) -> Tensor:
    """Update all planes by the same calls: eagerly, the fewest calls are fastest."""
    planes = torch.arange(_PLANES, device=words.codes.device)[:, None]
    codes = _widened(config, words.codes)[:, None]
    counters, found = _step(config, codes, words.counters, words.votes, slack, planes)
    words.counters.copy_(counters)
    pairs = found[:, :2] | found[:, 2:]
    return _leave(config, pairs[:, 0] | pairs[:, 1], words.votes[:, 0])


def _plane_by_plane(
    config: PassConfig, codes: Tensor, counters: list[Tensor], votes: list[Tensor], slack: Tensor
) -> Tensor:
    """Update the planes side by side: compiled, one loop then reads everything once."""
    codes = _widened(config, codes)
    changes = torch.zeros_like(codes)
    new = []
    for plane, (a, vote) in enumerate(zip(counters, votes, strict=True)):
        kept, found = _step(config, codes, a, vote, slack, plane)
        new.append(kept)
        changes = changes | found
    for a, kept in zip(counters, new, strict=True):
        a.copy_(kept)
    return _leave(config, changes, votes[0])


def _step(
    config: PassConfig, codes: Tensor, a: Tensor, vote: Tensor, slack: Tensor, plane: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Update a plane: (its counters, the changed bits of its codes or what else was found, in place)."""
    fields = config.fields
    nonzero, minus = swar.decode(fields, codes, plane, config.bits)
    v = _sign_extend(_widen(vote)) if config.widen else vote
    update = swar.flip if config.kind == "flip" else swar.accumulate
    counters, found = update(fields, a, v, nonzero, minus, slack, cancel=config.cancel)
    return counters, found << (config.bits * plane)


def _leave(config: PassConfig, changes: Tensor, workspace: Tensor) -> Tensor:
    """Count the changes and leave them in ``workspace``, the first plane of votes, which has been read.

    A compiled graph would allocate new memory for them, which takes as long as the pass.
    """
    if config.kind == "flip":
        workspace.copy_(changes if config.fields == INT8 else _narrow(changes))
    # Summing rows first lets Inductor count within the same loop.
    return swar.count_changes(changes, config.bits).sum(1).sum()


def _widened(config: PassConfig, codes: Tensor) -> Tensor:
    return codes if config.fields == INT8 else _widen(codes)


def _widen(bytes4: Tensor) -> Tensor:
    """Spread the four bytes of an int32 over the lower halves of an int64's 16-bit fields."""
    wide = bytes4.to(torch.int64) & 0xFFFFFFFF
    wide = (wide | (wide << 16)) & swar.splat(0xFFFF, 32)
    return (wide | (wide << 8)) & swar.splat(0xFF, 16)


def _narrow(words: Tensor) -> Tensor:
    """Undo :func:`_widen`."""
    words = (words | (words >> 8)) & swar.splat(0xFFFF, 32)
    return (words | (words >> 16)).to(torch.int32)


def _sign_extend(words: Tensor) -> Tensor:
    """Turn int8 values in 16-bit fields into int16."""
    signs = words & swar.splat(0x80, 16)
    return words | ((signs << 9) - (signs << 1))


def _is_aligned(config: PassConfig, packed: Tensor, accumulator: Tensor, votes: Tensor) -> bool:
    """Tell whether the tensors can be viewed as words where they lie in memory."""
    tensors = (packed, accumulator, votes)
    return (
        accumulator.shape[1] * config.bits == 8 * packed.shape[1]
        and packed.shape[1] % config.packed_dtype.itemsize == 0
        and all(tensor.is_contiguous() for tensor in tensors)
        and all(tensor.storage_offset() * tensor.itemsize % _WORD_BYTES == 0 for tensor in tensors)
    )


def _view(config: PassConfig, packed: Tensor, accumulator: Tensor, votes: Tensor) -> Words:
    shape = (-1, _PLANES, packed.shape[1])
    words = packed.view(config.packed_dtype)
    return Words(
        words,
        _split_halves(words) if config.bits == 1 else words,
        accumulator.view(shape).view(torch.int64),
        votes.view(shape).view(config.votes_dtype),
    )


def _padded(config: PassConfig, packed: Tensor, accumulator: Tensor, votes: Tensor) -> Words:
    """Copy into rows of whole words; the padding has counters and votes of 0, so nothing flips there."""
    rows, width = packed.shape
    wide = -(-width // config.packed_dtype.itemsize) * config.packed_dtype.itemsize
    codes = packed.new_zeros(rows, wide)
    codes[:, :width] = packed
    counters = accumulator.new_zeros((rows, 8 // config.bits, wide), dtype=config.fields.dtype)
    cast = votes.new_zeros(counters.shape)
    for tensor, copy in ((accumulator, counters), (votes, cast)):
        for index, plane in _planes(tensor, width):
            copy[:, index, : plane.shape[1]] = plane
    return _view(config, codes, counters.view(rows, -1), cast.view(rows, -1))


def _planes(tensor: Tensor, width: int) -> list[tuple[int, Tensor]]:
    """Cut rows into planes that are as wide as packed rows; the last one may be shorter."""
    starts = range(0, tensor.shape[1], width)
    return [(index, tensor[:, start : start + width]) for index, start in enumerate(starts)]


def _split_halves(words: Tensor) -> Tensor:
    """Make two rows of each: the lower four bits of a byte matter in the first, the higher in the second."""
    return torch.stack((words, words >> 4), 1).flatten(0, 1)


def _join_halves(changes: Tensor) -> Tensor:
    """Put the lower four bits of every two rows into one row, in the order of :func:`_split_halves`."""
    return changes[::2] | (changes[1::2] << 4)


def _copy_back(into: Tensor, padded: Tensor) -> None:
    into.copy_(padded[:, : into.shape[1]])


def _trial(config: PassConfig, device: torch.device) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Make example arguments to compile the graph with."""
    slack = torch.zeros((), dtype=torch.int64, device=device)
    counters, votes = (trial_planes(_PLANES, dtype, device) for dtype in (torch.int64, config.votes_dtype))
    return trial_matrix(config.packed_dtype, device), counters, votes, slack
