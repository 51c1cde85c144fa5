"""The bits of a float32 that a bfloat16 or float16 parameter drops, kept beside it as a correction.

Parameter and correction together are the master weight, in 24 bits or 32, and no float32 copy exists. All is
integer arithmetic on the bits of |x|, whose order is that of the numbers: adding to them rounds away from 0
for both signs, and carries into the exponent as it should.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["CORRECTIONS", "Master", "dropped_bits", "join", "part"]

Master = Literal["split8", "split16"]

CORRECTIONS: dict[Master, torch.dtype] = {"split8": torch.int8, "split16": torch.int16}

_DROPPED = {torch.bfloat16: 16, torch.float16: 13}
# The least magnitude whose high bits the parameter's dtype does not represent: 2¹²⁸ and 2¹⁶.
_OVERFLOW = {torch.bfloat16: 0x7F800000, torch.float16: 0x47800000}
_SIGN, _MAGNITUDE, _INFINITY = -(1 << 31), 0x7FFFFFFF, 0x7F800000
_NORMAL = 2.0**-14  # float16 is subnormal below it


def dropped_bits(dtype: torch.dtype, width: torch.dtype) -> int:
    """Return how many of a float32's lowest bits neither the parameter nor its correction keeps.

    >>> dropped_bits(torch.bfloat16, torch.int8), dropped_bits(torch.float16, torch.int16)
    (8, 0)
    """
    return _DROPPED[dtype] - 8 if width == torch.int8 else 0


def part(
    value: Tensor, dtype: torch.dtype, width: torch.dtype, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Part float32 values into parameters and corrections, which :func:`join` joins.

    The parameter is the value rounded to nearest, ties away from zero. The correction counts what is missing
    in units of the float32's last place, or with int8 of the last place of 24 bits, to which the value is
    rounded first. int16 keeps a bfloat16 parameter's value exactly, int8 within 2⁻¹⁶ of it. NaN, infinities
    and what the parameter's dtype does not reach have the correction 0.

    float16 numbers below 2⁻¹⁴ have a fixed spacing, so that their corrections do too, of 2⁻³⁷ or 2⁻³².

    Args:
        value: float32; it is not changed.
        dtype: the parameter's, bfloat16 or float16.
        width: the correction's: int8 or int16; int32 for the values of int16 in wider integers.
        noise: :func:`~steepest.random.bits32` of the value's shape, which round to 24 bits stochastically;
            None rounds to nearest. Not used unless the width is int8.

    >>> part(torch.tensor([1.0, 1.0 + 2**-12]), torch.bfloat16, torch.int8)
    (tensor([1., 1.], dtype=torch.bfloat16), tensor([0, 8], dtype=torch.int8))
    """
    dropped, cut = _DROPPED[dtype], dropped_bits(dtype, width)
    if dtype == torch.float16:
        magnitude = value.abs()
        shifted = magnitude < _NORMAL
        magnitude += shifted * _NORMAL
        bits = magnitude.view(torch.int32).clamp(max=_INFINITY)
    else:
        bits = (value.view(torch.int32) & _MAGNITUDE).clamp_(max=_INFINITY)
    if cut:
        bits += 1 << (cut - 1) if noise is None else (noise & ((1 << cut) - 1)).to(torch.int32)
        bits &= -(1 << cut)
    high = bits + (1 << (dropped - 1))
    high &= -(1 << dropped)
    finite = high < _OVERFLOW[dtype]
    bits -= high
    bits >>= cut
    bits *= finite
    if dtype == torch.float16:
        near = high.view(torch.float32)
        near = torch.copysign(near - shifted * _NORMAL, value)
    else:
        high |= value.view(torch.int32) & _SIGN
        near = high.view(torch.float32)
    return torch.where(finite, near, value).to(dtype), bits.to(width)


def join(param: Tensor, correction: Tensor) -> Tensor:
    """Join parameters and corrections into the float32 values that :func:`part` was given.

    A parameter that somebody has overwritten keeps its correction, which is then at most half a unit in the
    parameter's last place; 0 stays 0 or becomes a tiny number, of either sign, and never NaN.

    Args:
        param: bfloat16 or float16.
        correction: int8 or int16 of the parameter's shape; int32 is taken for the values of int16.

    >>> join(torch.tensor([1.0, -1.0], dtype=torch.bfloat16), torch.tensor([8, 8], dtype=torch.int8))
    tensor([ 1.0002, -1.0002])
    """
    added = correction.to(torch.int32)
    added = added << dropped_bits(param.dtype, correction.dtype)
    x = param.to(torch.float32)
    if param.dtype == torch.float16:
        magnitude = x.abs()
        # 2⁻¹⁴ itself is also what numbers just below it are rounded to.
        shifted = (magnitude < _NORMAL) | ((magnitude == _NORMAL) & (added < 0))
        magnitude += shifted * _NORMAL
        added += magnitude.view(torch.int32)
        return torch.copysign((added.view(torch.float32) - shifted * _NORMAL).clamp_(min=0.0), x)
    bits = x.view(torch.int32)
    added += bits & _MAGNITUDE
    # Below 0 where somebody has written 0 beside a negative correction: the bits of a NaN.
    added.clamp_(min=0)
    added |= bits & _SIGN
    return added.view(torch.float32)
