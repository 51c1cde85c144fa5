"""Passes over a layer: its packed weights and counters as words, all of them in one sweep over memory.

A byte of packed weights holds four that are a quarter of a row apart (:mod:`steepest.ternary.packing`). So
each quarter of a row of counters is a *plane* whose words lie beside the packed bytes' own, and a pass
reads one word of packed weights with a word of each plane.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steepest.compile.dynamic import run_dynamic, trial_matrix, trial_planes
from steepest.ternary import swar
from steepest.ternary.chunks import MOVES_WEIGHTS, row_pieces
from steepest.ternary.swar import BYTES, SHORTS, Lanes

__all__ = ["run_pass"]

_PLANES = 4
_WORD_BYTES = 8

Kind = Literal["flip", "collect"]


@dataclass(frozen=True)
class Pass:
    """What one graph is made for.

    Attributes:
        kind: ``"flip"`` or ``"collect"``, see the functions of :mod:`steepest.ternary.swar`.
        lanes: of the counters.
        spread: whether votes are int8 where counters are int16.
        cancel: at a bound, counters stop at 0.
    """

    kind: Kind
    lanes: Lanes
    spread: bool
    cancel: bool

    @property
    def packed_dtype(self) -> torch.dtype:
        """Of the words of packed weights: one for each word of counters."""
        return torch.int64 if self.lanes == BYTES else torch.int32

    @property
    def votes_dtype(self) -> torch.dtype:
        """Of the votes' words."""
        return torch.int32 if self.spread else torch.int64


class Sheet(NamedTuple):
    """Some rows as words: packed [rows, words], counters and votes [rows, 4 planes, words]."""

    packed: Tensor
    counters: Tensor
    votes: Tensor


def run_pass(
    kind: Kind,
    packed: Tensor,
    accumulator: Tensor,
    votes: Tensor,
    *,
    threshold: int,
    cancel: bool,
    compiled: bool,
) -> Tensor:
    """Run a pass over a layer in place.

    Args:
        kind: ``"flip"`` takes votes in and flips; ``"collect"`` takes them in.
        packed: T, uint8 [out, ⌈in/4⌉].
        accumulator: a, int8 or int16 [out, in].
        votes: votes, int8 or int16 [out, in]. What is left in it means nothing.
        threshold: τ; for ``"flip"`` at most the largest number of a's dtype.
        cancel: see :class:`Pass`.
        compiled: by a graph.

    Returns:
        The number of flips, or for ``"collect"`` of those with |a| ≥ τ; 0-dim int64.
    """
    rows, columns = accumulator.shape
    lanes = BYTES if accumulator.dtype == votes.dtype == torch.int8 else SHORTS
    # Eagerly a conversion is faster than what a graph does within its loop.
    what = Pass(kind, lanes, compiled and lanes == SHORTS and votes.dtype == torch.int8, cancel)
    # A counter of int8 among int16's votes is one of int16 for the pass, and its bound that of int8.
    fits = accumulator.dtype == lanes.dtype
    limit = torch.iinfo(accumulator.dtype).max
    slack = torch.tensor(lanes.slack(min(threshold, lanes.limit + 1)), device=packed.device)
    whole = fits and _is_whole(what, packed, accumulator, votes)
    count = torch.zeros((), dtype=torch.int64, device=packed.device)
    # A graph makes nothing as large as the layer: it takes all rows at once.
    parts = [slice(0, rows)] if whole and compiled else row_pieces(rows, columns, packed.device)
    for part in parts:
        mine = packed[part], accumulator[part], votes[part].to(torch.int8 if what.spread else lanes.dtype)
        sheet = _view(what, *mine) if whole else _padded(what, *mine)
        count += _run(what, sheet, slack, compiled)
        if kind != "collect":
            sheet.packed.bitwise_xor_(sheet.votes[:, 0].to(what.packed_dtype))
        if not whole:
            _back(mine[0], sheet.packed.view(torch.uint8))
            numbers = sheet.counters.view(lanes.dtype)
            numbers = numbers if fits else numbers.clamp(-limit, limit)
            for place, piece in _quarters(mine[1], packed.shape[1]):
                _back(piece, numbers[:, place])
    return count


def _run(what: Pass, sheet: Sheet, slack: Tensor, compiled: bool) -> Tensor:
    """Run a pass over a sheet's counters, in place; the count.

    What changes in ``packed`` is left in the first plane of ``votes``.
    """
    # torch makes graphs of their own for a size of 1.
    if not compiled or 1 in sheet.packed.shape:
        return _all_at_once(what, sheet, slack)

    def sweep(packed: Tensor, counters: list[Tensor], votes: list[Tensor], slack: Tensor) -> Tensor:
        return _plane_by_plane(what, packed, counters, votes, slack)

    device = sheet.packed.device
    arguments = sheet.packed, list(sheet.counters.unbind(1)), list(sheet.votes.unbind(1)), slack
    return run_dynamic((what, device), sweep, arguments, MOVES_WEIGHTS, lambda: _trial(what, device))


def _all_at_once(what: Pass, sheet: Sheet, slack: Tensor) -> Tensor:
    """As :func:`_plane_by_plane`: eagerly, few calls are best."""
    places = torch.arange(_PLANES, device=sheet.packed.device)[:, None]
    codes = _codes(what, sheet.packed)[:, None]
    kept, found = _step(what, codes, sheet.counters, sheet.votes, slack, places)
    sheet.counters.copy_(kept)
    pairs = found[:, :2] | found[:, 2:]
    return _leave(what, pairs[:, 0] | pairs[:, 1], sheet.votes[:, 0])


def _plane_by_plane(
    what: Pass, packed: Tensor, counters: list[Tensor], votes: list[Tensor], slack: Tensor
) -> Tensor:
    """As :func:`_all_at_once`: compiled, one loop over the planes side by side reads everything once."""
    codes = _codes(what, packed)
    changes = torch.zeros_like(codes)
    new = []
    for place, (a, vote) in enumerate(zip(counters, votes, strict=True)):
        kept, found = _step(what, codes, a, vote, slack, place)
        new.append(kept)
        changes = changes | found
    for a, kept in zip(counters, new, strict=True):
        a.copy_(kept)
    return _leave(what, changes, votes[0])


def _step(
    what: Pass, codes: Tensor, a: Tensor, vote: Tensor, slack: Tensor, place: int | Tensor
) -> tuple[Tensor, Tensor]:
    """(the counters of a plane, what changes in the codes or else was found, at the plane's place)."""
    lanes = what.lanes
    nonzero, minus = swar.trits(lanes, codes, place)
    v = _signed(_spread(vote)) if what.spread else vote
    rule = swar.flipped if what.kind == "flip" else swar.collected
    kept, found = rule(lanes, a, v, nonzero, minus, slack, cancel=what.cancel)
    return kept, found << (2 * place)


def _leave(what: Pass, changes: Tensor, room: Tensor) -> Tensor:
    """Count the changes and leave them in ``room``, which has been read.

    A graph would get new memory for them, which takes as long as the pass.
    """
    if what.kind != "collect":
        room.copy_(changes if what.lanes == BYTES else _gathered(changes))
    # By rows first: so the compiler counts in the same loop.
    return swar.flips_in(changes).sum(1).sum()


def _codes(what: Pass, packed: Tensor) -> Tensor:
    return packed if what.lanes == BYTES else _spread(packed)


def _spread(bytes4: Tensor) -> Tensor:
    """The four bytes of an int32 in the lower halves of an int64's lanes of 16 bits."""
    wide = bytes4.to(torch.int64) & 0xFFFFFFFF
    wide = (wide | (wide << 16)) & swar.splat(0xFFFF, 32)
    return (wide | (wide << 8)) & swar.splat(0xFF, 16)


def _gathered(lanes: Tensor) -> Tensor:
    """What :func:`_spread` has spread."""
    lanes = (lanes | (lanes >> 8)) & swar.splat(0xFFFF, 32)
    return (lanes | (lanes >> 16)).to(torch.int32)


def _signed(lanes: Tensor) -> Tensor:
    """int8's in lanes of 16 bits, made int16's."""
    signs = lanes & swar.splat(0x80, 16)
    return lanes | ((signs << 9) - (signs << 1))


def _is_whole(what: Pass, packed: Tensor, accumulator: Tensor, votes: Tensor) -> bool:
    """Whether a layer is words as it lies in memory."""
    tensors = (packed, accumulator, votes)
    return (
        accumulator.shape[1] == _PLANES * packed.shape[1]
        and packed.shape[1] % what.packed_dtype.itemsize == 0
        and all(tensor.is_contiguous() for tensor in tensors)
        and all(tensor.storage_offset() * tensor.itemsize % _WORD_BYTES == 0 for tensor in tensors)
    )


def _view(what: Pass, packed: Tensor, accumulator: Tensor, votes: Tensor) -> Sheet:
    shape = (len(packed), _PLANES, packed.shape[1])
    return Sheet(
        packed.view(what.packed_dtype),
        accumulator.view(shape).view(torch.int64),
        votes.view(shape).view(what.votes_dtype),
    )


def _padded(what: Pass, packed: Tensor, accumulator: Tensor, votes: Tensor) -> Sheet:
    """Copies whose rows are whole words; in what is added nothing votes and nothing counts."""
    rows, width = packed.shape
    wide = -(-width // what.packed_dtype.itemsize) * what.packed_dtype.itemsize
    made = packed.new_zeros(rows, wide)
    made[:, :width] = packed
    counters = accumulator.new_zeros((rows, _PLANES, wide), dtype=what.lanes.dtype)
    cast = votes.new_zeros((rows, _PLANES, wide))
    for tensor, copy in ((accumulator, counters), (votes, cast)):
        for place, piece in _quarters(tensor, width):
            copy[:, place, : piece.shape[1]] = piece
    return Sheet(
        made.view(what.packed_dtype),
        counters.view(torch.int64),
        cast.view(what.votes_dtype),
    )


def _quarters(tensor: Tensor, width: int) -> list[tuple[int, Tensor]]:
    """The planes of some rows; of few columns the last ones are shorter, or empty."""
    return [(place, tensor[:, place * width : (place + 1) * width]) for place in range(_PLANES)]


def _back(into: Tensor, padded: Tensor) -> None:
    into.copy_(padded[:, : into.shape[1]])


def _trial(what: Pass, device: torch.device) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Make arguments to compile a pass with."""
    slack = torch.zeros((), dtype=torch.int64, device=device)
    counters, votes = (trial_planes(_PLANES, dtype, device) for dtype in (torch.int64, what.votes_dtype))
    return trial_matrix(what.packed_dtype, device), counters, votes, slack
