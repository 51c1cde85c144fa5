"""SIMD within a register (SWAR): 8 int8 or 4 int16 counters side by side in one 64-bit word.

Tensor code on a CPU is fast on whole words: bytes and boolean masks are slow eagerly, and torch.compile
vectorizes int64 but not int16. So counters and weights share a word, each in a *field* of its own, and the
same functions run eagerly and compiled. A yes/no answer is the highest bit of its field; the lower bits of
an answer are undefined.

A weight's code is 2 bits, its two's complement (ternary), or 1 bit, its sign (binary: 0 is +1, 1 is −1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["INT8", "INT16", "Fields", "accumulate", "count_changes", "decode", "flip", "splat"]

_WORD = 64


def splat(number: int, width: int) -> int:
    """Return the int64 whose fields of ``width`` bits all hold ``number`` ≥ 0."""
    word = number * (((1 << _WORD) - 1) // ((1 << width) - 1))
    return word - (1 << _WORD) if word >> (_WORD - 1) else word


@dataclass(frozen=True)
class Fields:
    """How a word is divided into fields, and the masks that follow from the dtype of a counter."""

    # Not the number of bits: torch.compile treats plain numbers as values that may change.
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """Bits of a field."""
        return 8 * self.dtype.itemsize

    @property
    def high(self) -> int:
        """Mask of the highest bit of every field."""
        return splat(1 << (self.width - 1), self.width)

    def slack(self, threshold: int) -> int:
        """Return the word that, added to sizes |a|, sets the highest bits where |a| ≥ τ, if a can reach τ."""
        return splat(max((1 << (self.width - 1)) - threshold, 0), self.width)

    def bit(self, answer: Tensor, position: int) -> Tensor:
        """Move each field's answer to bit ``position`` and clear all other bits."""
        return (answer >> (self.width - 1 - position)) & splat(1 << position, self.width)

    def mask(self, answer: Tensor) -> Tensor:
        """Set all bits of the fields that answer yes and clear the others."""
        lowest = self.bit(answer, 0)
        return (lowest << self.width) - lowest


INT8, INT16 = Fields(torch.int8), Fields(torch.int16)


Code = tuple[Tensor | None, Tensor]
"""Of a plane: whether T is not 0 (None: binary weights), and whether T is −1."""


def decode(fields: Fields, packed: Tensor, plane: int | Tensor, bits: int) -> Code:
    """Read a plane's codes."""
    sign = packed << (fields.width - bits - bits * plane)
    return (None if bits == 1 else packed << (fields.width - 1 - bits * plane)), sign


def _add(fields: Fields, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Add with wrap-around: (a + v, whether it overflowed)."""
    differ = a ^ v
    low = ~fields.high
    total = ((a & low) + (v & low)) ^ (differ & fields.high)
    # Equal signs, and another sign in the sum.
    return total, (a ^ total) & ~differ


def _outward(code: Code, negative: Tensor) -> Tensor:
    """Tell where T is at a bound and the counter's sign points beyond it; a counter of 0 is positive."""
    nonzero, minus = code
    agree = ~(minus ^ negative)
    return agree if nonzero is None else nonzero & agree


def _reached(fields: Fields, total: Tensor, slack: Tensor) -> Tensor:
    """Tell where |total| ≥ threshold; each sign has its own sum, which cannot leave its field."""
    size = total & ~fields.high
    up, down = size + slack, (slack | fields.high) - size
    return up ^ ((up ^ down) & total)


def flip(
    fields: Fields, a: Tensor, v: Tensor, code: Code, slack: Tensor, cancel: bool
) -> tuple[Tensor, Tensor]:
    """a ← a + v; where |a| ≥ τ: T takes one step toward sign(a) unless it is at that bound, and a ← 0.

    Returns the counters, and the bits of T's code that change, at the low end of each field. ``slack`` is of
    τ ≤ M, so every sum that overflows has reached τ. ``cancel``: at a bound, set a to 0 where it would point
    outward.
    """
    total, overflowed = _add(fields, a, v)
    negative = total ^ overflowed
    reached = overflowed | _reached(fields, total, slack)
    outward = _outward(code, negative)
    cleared = reached | outward if cancel else reached
    moving, nonzero = reached & ~outward, code[0]
    # Every move changes the lowest bit. A ternary code's higher bit is set from 0 to −1 and cleared from −1
    # to 0.
    changes = fields.bit(moving, 0)
    if nonzero is not None:
        changes = changes | fields.bit(moving & (negative ^ nonzero), 1)
    return total & ~fields.mask(cleared), changes


def accumulate(
    fields: Fields, a: Tensor, v: Tensor, code: Code, slack: Tensor, cancel: bool
) -> tuple[Tensor, Tensor]:
    """a ← clamp(a + v, −M, M), and T stays: (the counters, |a| ≥ τ in the lowest bit of each field)."""
    total, overflowed = _add(fields, a, v)
    # M, or −M where a (and so v) is below 0: they differ in all bits but the lowest.
    low = ~fields.high
    bound = low ^ (fields.mask(a) & ~splat(1, fields.width))
    total = total ^ ((total ^ bound) & fields.mask(overflowed))
    # −M − 1 is the only number without a bit below its highest.
    lowest = total & ~((total & low) + low)
    total = total | fields.bit(lowest, 0)
    if cancel:
        total = total & ~fields.mask(_outward(code, total))
    return total, fields.bit(_reached(fields, total, slack), 0)


def count_changes(changes: Tensor, bits: int) -> Tensor:
    """Count, in every word, the codes of ``bits`` bits whose lowest bit is set, as each changed code's is."""
    pairs = changes & splat(0x55, 8)
    if bits == 1:
        pairs = pairs + ((changes >> 1) & splat(0x55, 8))
    fours = (pairs & splat(0x33, 8)) + ((pairs >> 2) & splat(0x33, 8))
    eights = (fours & splat(0x0F, 8)) + ((fours >> 4) & splat(0x0F, 8))
    # The product's highest byte is the sum of all.
    return (eights * splat(1, 8)) >> (_WORD - 8)
