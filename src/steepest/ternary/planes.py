"""Update a layer's packed weights and counters in one sweep over memory, 64 bits at a time.

A byte of packed ternary weights holds four that are a quarter of a row apart. A quarter of a row of counters
is a *plane*. Its words line up with the packed bytes, so the pass reads one word of packed weights and one of
each plane. A byte of binary weights holds eight: its halves are taken apart first, so that a row becomes two
rows of four planes each and the same loop serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steepest.compile.dynamic import run_dynamic, trial_matrix, trial_planes
from steepest.ternary import swar
from steepest.ternary.chunks import MOVES_WEIGHTS, row_chunks
from steepest.ternary.swar import INT8, INT16, Fields

__all__ = ["Kind", "run_pass"]

_PLANES = 4

Kind = Literal["flip", "accumulate"]


@dataclass(frozen=True)
class PassConfig:
    """What one compiled graph is specialized for, beside dtypes; see :func:`run_pass`."""

    kind: Kind
    bits: int
    fields: Fields
    cancel: bool


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
    """Run a pass over a layer, in place: "flip" adds the votes and flips, "accumulate" only adds them.

    Returns the number of flips, or for "accumulate" of counters with |a| ≥ threshold; 0-dim int64. ``votes``,
    int8 or int16, are destroyed. To flip, ``threshold`` is at most the largest value of the accumulator's
    dtype. With ``cancel`` a counter at a bound becomes 0 where it would point outward.
    """
    (rows, columns), width, device = accumulator.shape, packed.shape[1], packed.device
    # An int8 counter with int16 votes is computed as int16, then clamped to int8's limits.
    fields = INT8 if accumulator.dtype == votes.dtype == torch.int8 else INT16
    # Eagerly, converting the votes beforehand is faster than widening them within the pass.
    votes_dtype = votes.dtype if compiled else fields.dtype
    config = PassConfig(kind, bits, fields, cancel)
    slack = torch.tensor(fields.slack(threshold), device=device)
    # Bytes of packed weights beside a word of counters.
    beside = 8 // fields.dtype.itemsize
    aligned = (
        accumulator.dtype == fields.dtype
        and columns * bits == 8 * width
        and width % beside == 0
        and all(t.is_contiguous() for t in (packed, accumulator, votes))
        and all(t.storage_offset() * t.itemsize % 8 == 0 for t in (packed, accumulator, votes))
    )
    count = torch.zeros((), dtype=torch.int64, device=device)
    # A compiled graph allocates nothing of the layer's size, so it takes all rows at once.
    chunks = [slice(0, rows)] if aligned and compiled else row_chunks(rows, columns, device)
    for chunk in chunks:
        t, a, v = packed[chunk], accumulator[chunk], votes[chunk].to(votes_dtype)
        if aligned:
            count += _sweep(config, t, a, v, slack, compiled)
            continue
        wide = -(-width // beside) * beside
        t = _padded(t, 1, width, wide)
        a, v = (_padded(each, 8 // bits, width, wide) for each in (a.to(fields.dtype), v))
        count += _sweep(config, t, a, v, slack, compiled)
        limit = torch.iinfo(accumulator.dtype).max
        packed[chunk] = t[:, :width]
        kept = a.view(len(a), -1, wide)[..., :width].flatten(1)[:, :columns]
        accumulator[chunk] = kept.clamp(-limit, limit)
    return count


def _padded(rows: Tensor, planes: int, width: int, wide: int) -> Tensor:
    """Copy rows, and pad their planes to whole words by zeros, which vote for nothing."""
    full = torch.nn.functional.pad(rows.contiguous(), (0, planes * width - rows.shape[1]))
    return torch.nn.functional.pad(full.view(-1, width), (0, wide - width)).view(len(rows), planes * wide)


def _sweep(
    config: PassConfig, packed: Tensor, accumulator: Tensor, votes: Tensor, slack: Tensor, compiled: bool
) -> Tensor:
    """Run a pass over rows of whole words in place and return the count."""
    device, shape = packed.device, (-1, _PLANES, packed.shape[1])
    words = packed.view(torch.int64 if config.fields == INT8 else torch.int32)
    # Two rows of each: the lower four bits of a byte matter in the first, the higher in the second.
    codes = torch.stack((words, words >> 4), 1).flatten(0, 1) if config.bits == 1 else words
    counters = accumulator.view(shape).view(torch.int64)
    cast = votes.view(shape).view(torch.int64 if votes.dtype == config.fields.dtype else torch.int32)

    def sweep(codes: Tensor, counters: list[Tensor], votes: list[Tensor], slack: Tensor) -> Tensor:
        return _plane_by_plane(config, codes, counters, votes, slack)

    def trial() -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        a, v = (trial_planes(_PLANES, dtype, device) for dtype in (torch.int64, cast.dtype))
        return trial_matrix(words.dtype, device), a, v, torch.zeros_like(slack)

    # torch.compile specializes on the size 1.
    if compiled and 1 not in codes.shape:
        arguments = codes, list(counters.unbind(1)), list(cast.unbind(1)), slack
        count = run_dynamic((config, cast.dtype, device), sweep, arguments, MOVES_WEIGHTS, trial)
    else:
        count = _all_planes(config, codes, counters, cast, slack)
    if config.kind == "flip":
        changes = cast[:, 0].to(words.dtype)
        words ^= changes[::2] | (changes[1::2] << 4) if config.bits == 1 else changes
    return count


def _all_planes(config: PassConfig, codes: Tensor, counters: Tensor, votes: Tensor, slack: Tensor) -> Tensor:
    """Update all planes by the same calls: eagerly, the fewest calls are fastest."""
    planes = torch.arange(_PLANES, device=codes.device)[:, None]
    kept, found = _step(config, _widen(codes)[:, None], counters, votes, slack, planes)
    counters.copy_(kept)
    pairs = found[:, :2] | found[:, 2:]
    return _leave(config, pairs[:, 0] | pairs[:, 1], votes[:, 0])


def _plane_by_plane(
    config: PassConfig, codes: Tensor, counters: list[Tensor], votes: list[Tensor], slack: Tensor
) -> Tensor:
    """Update the planes side by side: compiled, one loop then reads everything once."""
    codes = _widen(codes)
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
    v = _sign_extend(_widen(vote)) if vote.dtype == torch.int32 else vote
    update = swar.flip if config.kind == "flip" else swar.accumulate
    code = swar.decode(config.fields, codes, plane, config.bits)
    counters, found = update(config.fields, a, v, code, slack, config.cancel)
    return counters, found << (config.bits * plane)


def _leave(config: PassConfig, changes: Tensor, workspace: Tensor) -> Tensor:
    """Count the changes and leave them in ``workspace``, the first plane of votes, which has been read."""
    # New memory for them takes as long as the pass.
    if config.kind == "flip":
        workspace.copy_(changes if config.fields == INT8 else _narrow(changes))
    # Summing rows first lets Inductor count within the same loop.
    return swar.count_changes(changes, config.bits).sum(1).sum()


def _widen(words: Tensor) -> Tensor:
    """Spread the four bytes of an int32 over the lower halves of an int64's 16-bit fields."""
    if words.dtype == torch.int64:
        return words
    wide = words.to(torch.int64) & 0xFFFFFFFF
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
