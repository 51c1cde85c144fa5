"""One byte per element and a float32 scale per block: roots of the elements, relative to the largest.

Every operation is exact or rounds once, so that eager and compiled code give the same bits. Inductor makes
two vectorized loops of a graph with blocks as rows, [k, block] with dynamic k: the maxima, then the rest.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "DTYPES",
    "Range",
    "decode",
    "decode_nonnegative",
    "decode_signed",
    "encode_nonnegative",
    "encode_signed",
]

Range = Literal["signed", "slow", "nonnegative"]
"""The values of an average: of either sign, of either sign in an average so slow that rounding to nearest
would stop it, or never negative."""

DTYPES: dict[Range, torch.dtype] = {"signed": torch.int8, "slow": torch.int8, "nonnegative": torch.uint8}

_TINY = torch.finfo(torch.float32).tiny  # 2⁻¹²⁶: the reciprocals of smaller numbers may be infinite

# A little more than 255: what a code represents exactly must not have the code below for its floor after a
# few roundings. A larger excess would keep a slowly falling average from falling.
_FLOOR_FACTOR = 255 + 2.0**-13
_ROOT_FACTOR = 127 + 2.0**-14


def encode_signed(x: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Encode as sign(x)·round(127·√(|x|/a)), where a is the largest magnitude of a block.

    The error is at most a·(√(|x|/a)/127 + 1/254²); magnitudes of more than a/254² have a code other than 0.
    Rounded stochastically it may be twice as large, and the expectation of the decoded value is x.

    Args:
        x: float32 [..., block]; it is not changed.
        u: uniform in [0, 1), float32 of x's shape, to round stochastically; None rounds the root to nearest.

    Returns:
        Codes, int8 [..., block], and scales a, float32 [...]. Codes and scale are 0 if a < 2⁻¹²⁶; the codes
        are 0 and the scale is NaN if the block holds a NaN or an infinity.

    >>> encode_signed(torch.tensor([[4.0, -1.0, 0.25, 0.0]]))
    (tensor([[127, -64,  32,   0]], dtype=torch.int8), tensor([4.]))
    """
    scale = _scale(x.abs().amax(-1))
    t = x * scale.reciprocal().unsqueeze(-1)
    if u is None:
        t *= t.abs().clamp_(min=_TINY).rsqrt_()
        t *= 127.0
        code = t.round_()
    else:
        t = t.abs_().clamp_(max=1.0)
        code = t * t.clamp(min=_TINY).rsqrt_()
        code *= _ROOT_FACTOR
        code.floor_()
        t *= 127.0**2
        t -= code * code
        code += t.gt_((code * 2.0 + 1.0) * u)
        code = torch.copysign(code, x)
    return _zero_unless_positive(code, scale).to(torch.int8), scale


def decode_signed(codes: Tensor, scale: Tensor) -> Tensor:
    """Decode as code·|code|/127²·a, which undoes :func:`encode_signed`.

    Args:
        codes: int8 [..., block].
        scale: float32 [...]; NaN makes the whole block NaN.

    >>> decode_signed(torch.tensor([[127, -64, 0]], dtype=torch.int8), torch.tensor([4.0]))
    tensor([[ 4.0000, -1.0158,  0.0000]])
    """
    x = codes.to(torch.float32)
    x *= x.abs()
    # The scale last: 127 gives a itself, and a/127² may be subnormal, with few bits.
    x *= 1 / 127**2
    x *= scale.unsqueeze(-1)
    return x


def encode_nonnegative(x: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor]:
    """Encode as 255·(x/a)^¼, rounded stochastically; a is the largest element of a block.

    The expectation of the decoded value is x, unless that is below a/255⁴: whatever is above 0 has a code of
    at least 1, so that no rule divides by the root of an average that only seems to be 0.

    Args:
        x: float32 [..., block], ≥ 0; it is not changed.
        u: uniform in [0, 1), float32 of x's shape; None rounds to the nearest value.

    Returns:
        Codes, uint8 [..., block], and scales a, float32 [...]: as :func:`encode_signed` returns them.

    >>> encode_nonnegative(torch.tensor([[16.0, 1.0, 1e-12, 0.0]]), None)
    (tensor([[255, 127,   1,   0]], dtype=torch.uint8), tensor([16.]))
    """
    scale = _scale(x.amax(-1))
    t = x * scale.reciprocal().unsqueeze(-1)
    t.clamp_(max=1.0)
    code = t.clamp(min=_TINY).rsqrt_().rsqrt_()
    code *= _FLOOR_FACTOR
    code = torch.maximum(code.floor_(), x.clone().gt_(0.0))  # at least 1 where x > 0
    low = _fourth_power(code)
    gap = _fourth_power(code + 1.0)
    gap -= low
    gap *= 0.5 if u is None else u
    t *= 255.0**4
    t -= low
    code += t.gt_(gap)
    return _zero_unless_positive(code, scale).to(torch.uint8), scale


def decode_nonnegative(codes: Tensor, scale: Tensor) -> Tensor:
    """Decode as (code/255)⁴·a, which undoes :func:`encode_nonnegative`.

    Args:
        codes: uint8 [..., block].
        scale: float32 [...]; NaN makes the whole block NaN.

    >>> decode_nonnegative(torch.tensor([[255, 128, 0]], dtype=torch.uint8), torch.tensor([16.0]))
    tensor([[16.0000,  1.0158,  0.0000]])
    """
    x = codes.to(torch.float32)
    x *= 1 / 255
    x *= x
    x *= x
    x *= scale.unsqueeze(-1)
    return x


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Decode int8 codes with :func:`decode_signed` and uint8 codes with :func:`decode_nonnegative`."""
    return decode_signed(codes, scale) if codes.dtype == torch.int8 else decode_nonnegative(codes, scale)


def _scale(largest: Tensor) -> Tensor:
    return torch.where(largest < _TINY, 0.0, torch.where(largest < math.inf, largest, math.nan))


def _zero_unless_positive(code: Tensor, scale: Tensor) -> Tensor:
    # A block whose scale is 0 or NaN has NaN codes, which may become any integers. As integers they are
    # masked at once; torch.where and nan_to_num are slower, the one in eager code, the other if compiled.
    kept = -(scale > 0).to(torch.int32)
    return code.to(torch.int32).bitwise_and_(kept.unsqueeze(-1))


def _fourth_power(x: Tensor) -> Tensor:
    square = x * x
    square *= square
    return square
