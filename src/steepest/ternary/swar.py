"""The update of ternary weights in words of 64 bits, which hold 8 counters of int8 or 4 of int16.

A CPU's tensor code is fast where it works on whole words: bytes and masks are slow eagerly, and
torch.compile makes vectors of int64 but not of int16. So counters and weights are computed with side by
side in a word, each in a *lane* of its own, by the same functions eagerly and compiled. What a lane
answers, yes or no, is its highest bit; the bits below hold anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BYTES", "SHORTS", "Lanes", "collected", "flipped", "flips_in", "splat", "trits"]

_WORD = 64


def splat(number: int, width: int) -> int:
    """The int64 whose lanes of ``width`` bits all hold ``number`` ≥ 0.

    >>> hex(splat(0x7F, 16)), splat(0xFF, 8)
    ('0x7f007f007f007f', -1)
    """
    word = number * (((1 << _WORD) - 1) // ((1 << width) - 1))
    return word - (1 << _WORD) if word >> (_WORD - 1) else word


@dataclass(frozen=True)
class Lanes:
    """How a word is cut: masks of the lanes' highest bit, of the bits below it, and of the lowest.

    Attributes:
        dtype: of a counter, int8 or int16. (A dtype and not a number of bits: torch.compile takes numbers
            for what may change.)
    """

    dtype: torch.dtype

    @property
    def width(self) -> int:
        """Bits of a lane."""
        return 8 * self.dtype.itemsize

    @property
    def limit(self) -> int:
        """The largest number of a counter, M; the smallest is −M."""
        return (1 << (self.width - 1)) - 1

    @property
    def high(self) -> int:
        """The highest bits."""
        return splat(self.limit + 1, self.width)

    @property
    def low(self) -> int:
        """All bits but the highest."""
        return splat(self.limit, self.width)

    @property
    def one(self) -> int:
        """The lowest bits."""
        return splat(1, self.width)

    def slack(self, threshold: int) -> int:
        """The word by which :func:`flipped` knows a threshold of 1 ... M + 1."""
        return splat(self.limit + 1 - threshold, self.width)

    def bit(self, answer: Tensor, place: int) -> Tensor:
        """Answers at bit ``place`` of each lane, with nothing else in it."""
        return (answer >> (self.width - 1 - place)) & splat(1 << place, self.width)

    def mask(self, answer: Tensor) -> Tensor:
        """All bits of the lanes that say yes, none of the others."""
        lowest = self.bit(answer, 0)
        return (lowest << self.width) - lowest


BYTES, SHORTS = Lanes(torch.int8), Lanes(torch.int16)


def trits(lanes: Lanes, packed: Tensor, place: int | Tensor) -> tuple[Tensor, Tensor]:
    """(whether T is not 0, whether it is −1) for the ``place``-th pair of bits of each lane."""
    return packed << (lanes.width - 1 - 2 * place), packed << (lanes.width - 2 - 2 * place)


def _added(lanes: Lanes, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(a + v without what does not fit, whether it does not)."""
    apart = a ^ v
    total = ((a & lanes.low) + (v & lanes.low)) ^ (apart & lanes.high)
    # What has both signs alike, and another in the sum.
    return total, (a ^ total) & ~apart


def _outward(nonzero: Tensor, minus: Tensor, negative: Tensor) -> Tensor:
    """Where T is at a bound and the counter, by its sign, points beyond it; one of 0 is positive."""
    return nonzero & ~(minus ^ negative)


def _reached(lanes: Lanes, total: Tensor, slack: Tensor) -> Tensor:
    """Where |total| ≥ threshold, each sign by a sum of its own that cannot leave its lane."""
    size = total & lanes.low
    up, down = size + slack, (slack | lanes.high) - size
    return up ^ ((up ^ down) & total)


def _moves(lanes: Lanes, moving: Tensor, nonzero: Tensor, negative: Tensor) -> Tensor:
    """The bits of T's code that change, in the lowest pair of each lane.

    A move always changes the lower bit; the higher is set by going from 0 to −1, and cleared from −1 to 0.
    """
    return lanes.bit(moving, 0) | lanes.bit(moving & (negative ^ nonzero), 1)


def flipped(
    lanes: Lanes,
    a: Tensor,
    v: Tensor,
    nonzero: Tensor,
    minus: Tensor,
    slack: Tensor,
    *,
    cancel: bool,
) -> tuple[Tensor, Tensor]:
    """a ← a + v; where |a| ≥ τ: T ← clamp(T + sign(a), −1, 1), a ← 0.

    Args:
        lanes: how words are cut.
        a, v: counters and votes.
        nonzero, minus: T, see :func:`trits`.
        slack: τ ≤ M as :meth:`Lanes.slack` gives it, so that no sum that does not fit stays.
        cancel: at a bound, a stops at 0 where it would point outward.

    Returns:
        The counters, and the bits of T's code that change, in the lowest pair of each lane.
    """
    total, over = _added(lanes, a, v)
    negative = total ^ over
    reached = over | _reached(lanes, total, slack)
    outward = _outward(nonzero, minus, negative)
    cleared = reached | outward if cancel else reached
    return total & ~lanes.mask(cleared), _moves(lanes, reached & ~outward, nonzero, negative)


def collected(
    lanes: Lanes,
    a: Tensor,
    v: Tensor,
    nonzero: Tensor,
    minus: Tensor,
    slack: Tensor,
    *,
    cancel: bool,
) -> tuple[Tensor, Tensor]:
    """a ← clamp(a + v, −M, M), and T stays: (the counters, in the lowest bit where |a| ≥ τ)."""
    total, over = _added(lanes, a, v)
    # M, or −M where a (and so v) is below 0: they differ in the bits but the lowest.
    bound = lanes.low ^ (lanes.mask(a) & ~lanes.one)
    total = total ^ ((total ^ bound) & lanes.mask(over))
    # −M − 1 is the one number with no bit below its highest.
    least = total & ~((total & lanes.low) + lanes.low)
    total = total | lanes.bit(least, 0)
    if cancel:
        total = total & ~lanes.mask(_outward(nonzero, minus, total))
    return total, lanes.bit(_reached(lanes, total, slack), 0)


def flips_in(moves: Tensor) -> Tensor:
    """How many pairs of bits of each word have the lower one set, which no move leaves as it was.

    >>> flips_in(torch.tensor([0b01_11_00_10, -1])).tolist()
    [2, 32]
    """
    pairs = moves & splat(0x55, 8)
    fours = (pairs & splat(0x33, 8)) + ((pairs >> 2) & splat(0x33, 8))
    eights = (fours & splat(0x0F, 8)) + ((fours >> 4) & splat(0x0F, 8))
    # The product's highest byte is the sum of all.
    return (eights * splat(1, 8)) >> (_WORD - 8)
