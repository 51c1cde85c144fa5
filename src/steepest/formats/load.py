"""Conversions of whole tensors on loading: between floats, codes with other blocks, and corrections."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steepest.formats import int8
from steepest.formats.blocks import BLOCKS, scale_shape
from steepest.formats.master import dropped_bits

__all__ = ["block_of", "convert_correction", "decode", "encode", "reblock"]


def encode(value: Tensor, block: int, *, nonnegative: bool) -> tuple[Tensor, Tensor]:
    """Encode a floating-point tensor of any strides, nonnegative values to the nearest code of at least 1.

    Args:
        value: [shape[0], …], of any floating dtype.
        block: elements that share a scale, a divisor of numel / shape[0].
        nonnegative: whether to write :func:`~steepest.formats.int8.encode_nonnegative`'s codes.

    Returns:
        Contiguous codes of the tensor's shape, uint8 or int8, and float32 scales [shape[0], row / block].

    Raises:
        ValueError: the rows are not a multiple of ``block``, or the dtype is not floating-point.

    >>> codes, scale = encode(torch.ones(64, 32).t(), 64, nonnegative=False)
    >>> codes.shape, codes.is_contiguous(), scale.shape
    (torch.Size([32, 64]), True, torch.Size([32, 1]))
    """
    if not value.is_floating_point():
        raise ValueError(f"cannot encode a tensor of {value.dtype}: it is not floating-point")
    shape = scale_shape(value.shape, block)
    rows = value.to(torch.float32).contiguous().view(*shape, block)
    codes, scale = int8.encode_nonnegative(rows, None) if nonnegative else int8.encode_signed(rows)
    return codes.view(value.shape), scale


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Decode a whole tensor's codes into contiguous float32 of their shape.

    Args:
        codes: int8 or uint8 [shape[0], …], of any strides.
        scale: float32 [shape[0], row / block].

    Raises:
        ValueError: other dtypes, or scales of another shape than any block's.

    >>> decode(*encode(torch.full((32, 64), -0.5), 64, nonnegative=False)).unique()
    tensor([-0.5000])
    """
    if codes.numel() == 0:  # a shard without columns does not say how long the blocks are
        return codes.to(torch.float32)
    rows = codes.reshape(*scale.shape, block_of(codes, scale))
    return int8.decode(rows, scale).view(codes.shape)


def reblock(codes: Tensor, scale: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return codes and scales for blocks of another size; as they are where it is theirs already.

    Args:
        codes, scale: as :func:`decode` takes them.
        block: the new number of elements that share a scale.

    Raises:
        ValueError: as :func:`decode` and :func:`encode` raise it.

    >>> codes, scale = encode(torch.ones(32, 64), 32, nonnegative=True)
    >>> [part.shape for part in reblock(codes, scale, 64)]
    [torch.Size([32, 64]), torch.Size([32, 1])]
    """
    if codes.numel() > 0 and block_of(codes, scale) == block:
        return codes.contiguous(), scale
    return encode(decode(codes, scale), block, nonnegative=codes.dtype == torch.uint8)


def convert_correction(correction: Tensor | None, param: Tensor, width: torch.dtype) -> Tensor:
    """Return a correction of another width for the same parameter, with the parameter's strides.

    int8 becomes int16 exactly. int16 is rounded to nearest, but the parameter stays as it is: where rounding
    would reach its next value, the correction is the largest there is.

    Args:
        correction: int8 or int16 of the parameter's shape; None gives zeros.
        param: bfloat16 or float16.
        width: int8 or int16.

    Raises:
        ValueError: the correction has another shape or dtype.

    >>> weight = torch.ones(3, dtype=torch.bfloat16)
    >>> convert_correction(torch.tensor([-200, 256, 32767], dtype=torch.int16), weight, torch.int8).tolist()
    [-1, 1, 127]
    """
    new = torch.zeros_like(param, dtype=width)
    if correction is None:
        return new
    if correction.shape != param.shape or correction.dtype not in (torch.int8, torch.int16):
        raise ValueError(
            f"a correction of {correction.dtype} {list(correction.shape)} is not one of a parameter of shape "
            f"{list(param.shape)}"
        )
    bits = correction.to(torch.int32) << dropped_bits(param.dtype, correction.dtype)
    cut = dropped_bits(param.dtype, width)
    if cut:
        bits += 1 << (cut - 1)
        bits >>= cut
        bits.clamp_(max=127)
    return new.copy_(bits)


def block_of(codes: Tensor, scale: Tensor) -> int:
    """Return how many elements of these codes share a scale; only dtypes and shapes are read.

    Raises:
        ValueError: as :func:`decode` raises it.

    >>> block_of(torch.zeros(3, 64, dtype=torch.int8), torch.zeros(3, 2))
    32
    """
    if codes.dtype not in (torch.int8, torch.uint8) or scale.dtype != torch.float32:
        raise ValueError(f"codes are int8 or uint8 and scales float32, not {codes.dtype} and {scale.dtype}")
    # From the rows, since a shard may have none.
    block = math.prod(codes.shape[1:]) // scale.shape[1] if scale.dim() == 2 and scale.shape[1] else 0
    if block not in BLOCKS or scale_shape(codes.shape, block) != scale.shape:
        raise ValueError(f"scales {list(scale.shape)} do not belong to codes {list(codes.shape)}")
    return block
