"""Pack ternary and binary numbers: 2 bits or 1 bit each to compute with, base 3 to store ternary ones.

The 2-bit code of a ternary number is its two's complement: 00 is 0, 01 is 1, 11 is −1, 10 is unused. The
1-bit code of a binary number is its sign: 0 is 1, 1 is −1. A byte holds k = 4 or 8 numbers, so a row of n
takes q = ⌈n/k⌉ bytes, and byte j holds the numbers j, j + q, j + 2q, ..., lowest bits first. So the codes
at one position, over all bytes of a row, belong to a contiguous part of it (a *plane*), and packing and
unpacking are a few passes over whole words.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from steepest.compile.available import wants_compiling
from steepest.compile.dynamic import run_dynamic, trial_matrix, trial_planes
from steepest.ternary.chunks import LARGE, MOVES_WEIGHTS, row_chunks
from steepest.ternary.swar import splat

__all__ = [
    "Bits",
    "check_packed",
    "check_values",
    "count_zeros",
    "from_base3",
    "pack",
    "packed_width",
    "to_base3",
    "unpack",
    "unpack_into",
]

Bits = Literal[1, 2]

_DIGITS = 5  # of a base-3 byte: 3**5 = 243
_WORD = 8


def packed_width(count: int, bits: int = 2) -> int:
    """Return the bytes of a row of ``count`` numbers."""
    return -(-count * bits // 8)


def check_values(what: str, values: Tensor, bits: int = 2) -> None:
    """Raise ``ValueError`` unless every element is −1, 0 or 1, or with ``bits=1`` −1 or 1."""
    # Compared in the tensor's own dtype: conversion to int8 would accept 0.5 and 257.
    allowed = (values == 1) | (values == -1) | ((values == 0) & (bits == 2))
    if not bool(allowed.all()):
        raise ValueError(f"{what} must hold {'−1 and 1' if bits == 1 else '−1, 0 and 1'} only")


def check_packed(what: str, packed: Tensor, count: int, bits: int = 2) -> None:
    """Raise ``ValueError`` unless every row holds ``count`` valid codes and zero bits beyond them."""
    _check_layout(what, packed, count, bits)
    if bits == 2 and bool(((packed >> 1) & ~packed & 0x55).any()):
        raise ValueError(f"{what} holds the code 10, which encodes no number")
    padding = ~pack(torch.full((count,), -1, dtype=torch.int8, device=packed.device), bits=bits)
    if bool((packed & padding).any()):
        raise ValueError(f"{what} holds numbers beyond the {count} of a row")


def _check_layout(what: str, packed: Tensor, count: int, bits: int) -> None:
    _check_bits(bits)
    kind, width = "binary" if bits == 1 else "ternary", packed_width(count, bits)
    if count < 0:
        raise ValueError(f"the count of {kind} numbers must be at least 0, got {count}")
    if packed.dtype != torch.uint8 or packed.dim() == 0 or packed.shape[-1] != width:
        raise ValueError(
            f"{what}: {count} {kind} numbers are {width} bytes of uint8 a row, "
            f"got {packed.dtype} of shape {tuple(packed.shape)}"
        )


def _check_bits(bits: int) -> None:
    if bits not in (1, 2):
        raise ValueError(f"bits must be 1 (binary) or 2 (ternary), got {bits!r}")


def pack(values: Tensor, *, bits: int = 2, compile: bool = False) -> Tensor:
    """Pack int8 numbers −1, 0, 1 of shape [..., n] into uint8 [..., ⌈n·bits/8⌉].

    The values are not checked, which would take longer than packing: others give bytes that
    :func:`unpack` reads as something else.

    Args:
        values: the numbers.
        bits: 2 for ternary numbers; 1 for binary ones, −1 and 1.
        compile: run a graph of torch.compile, one for all sizes, where n is a multiple of 64/bits; warns
            without a compiler. Compiling takes seconds, which pays only for thousands of calls.

    Raises:
        ValueError: another dtype, no dimension, or other ``bits``.

    >>> pack(torch.tensor([[1, 0, -1, 0, 1]], dtype=torch.int8)).tolist()
    [[29, 0]]
    >>> pack(torch.tensor([[1, 1, -1, 1, 1]], dtype=torch.int8), bits=1).tolist()
    [[4]]
    """
    _check_bits(bits)
    if values.dtype != torch.int8 or values.dim() == 0:
        raise ValueError(
            f"pack() takes int8 of at least one dimension, got {values.dtype} of shape {tuple(values.shape)}"
        )
    count, leading = values.shape[-1], values.shape[:-1]
    width, planes = packed_width(count, bits), 8 // bits
    packed = torch.empty((leading.numel(), width), dtype=torch.uint8, device=values.device)
    rows = values.reshape(leading.numel(), count)
    if compile and _run(_join, packed, rows, bits):
        return packed.view(*leading, width)
    for part in row_chunks(len(rows), count, values.device, LARGE):
        chunk = rows[part]
        if count < planes * width:
            # By 1, the binary number whose code is 0.
            chunk = torch.nn.functional.pad(chunk, (0, planes * width - count), value=2 - bits)
        words = _as_words(chunk.contiguous().view(torch.uint8).view(len(chunk), planes, width))
        _join(packed[part].view(words.dtype), list(words.unbind(1)), bits)
    return packed.view(*leading, width)


def unpack(
    packed: Tensor, count: int, dtype: torch.dtype = torch.int8, *, bits: int = 2, compile: bool = False
) -> Tensor:
    """Unpack uint8 [..., ⌈count·bits/8⌉] into numbers [..., count] of ``dtype``.

    Byte j of q holds the numbers j, j + q, j + 2q, ..., lowest bits first: of ternary numbers the two's
    complement, of binary ones the sign. ``bits`` and ``compile`` are as in :func:`pack`.

    Raises:
        ValueError: another dtype, or rows of another width than ``count`` numbers have.

    >>> unpack(torch.tensor([[29, 0]], dtype=torch.uint8), 5).tolist()
    [[1, 0, -1, 0, 1]]
    >>> unpack(torch.tensor([[4]], dtype=torch.uint8), 5, bits=1).tolist()
    [[1, 1, -1, 1, 1]]
    """
    _check_layout("unpack()", packed, count, bits)
    if compile:
        rows = packed.reshape(packed.shape[:-1].numel(), packed.shape[-1])
        values = torch.empty((len(rows), count), dtype=torch.int8, device=packed.device)
        if _run(_split, rows, values, bits):
            return values.view(*packed.shape[:-1], count).to(dtype)
    return _unpacked(packed, count, bits).to(dtype).contiguous()


def _join(packed: Tensor, planes: list[Tensor], bits: int) -> None:
    """Pack planes of words, or of bytes."""
    # The sign of an int8 −1 or 1 is, among others, its second bit.
    code = 3 if bits == 2 else 2
    mask = splat(code, 8) if packed.dtype == torch.int64 else code
    codes = [_shifted(plane & mask, bits * at - (2 - bits)) for at, plane in enumerate(planes)]
    packed.copy_(functools.reduce(torch.bitwise_or, codes))


def _shifted(words: Tensor, left: int) -> Tensor:
    return words << left if left > 0 else words >> -left if left < 0 else words


def _split(packed: Tensor, planes: list[Tensor], bits: int) -> None:
    """Unpack words into planes of words: compiled, since so many steps are slow eagerly."""
    for at, plane in enumerate(planes):
        code = packed >> (bits * at)
        minus = (code >> (bits - 1)) & splat(1, 8)
        # The sign goes into all the higher bits of its byte; a binary number's lowest bit is always 1.
        lowest = code & splat(3, 8) if bits == 2 else splat(1, 8)
        plane.copy_(lowest | ((minus << 8) - (minus << bits)))


def _run(
    function: Callable[[Tensor, list[Tensor], int], None], packed: Tensor, values: Tensor, bits: int
) -> bool:
    """Run a compiled function over rows; False where they are not whole words, or there is no compiler."""
    (rows, width), device, planes = packed.shape, packed.device, 8 // bits
    # torch.compile specializes on the size 1. A caller who traces this makes a graph of his own.
    whole = values.shape[1] == planes * width and width % _WORD == 0 and min(rows, width // _WORD) > 1
    known = type(packed) is type(values) is Tensor and not torch.compiler.is_compiling()
    if not (whole and known and wants_compiling(True, values.numel(), device)):
        return False

    def run(packed: Tensor, planes: list[Tensor]) -> None:
        function(packed, planes, bits)

    words = _aligned(values).view(torch.int64).view(rows, planes, -1)
    run_dynamic(
        (function, bits, device),
        run,
        (_aligned(packed).view(torch.int64), list(words.unbind(1))),
        MOVES_WEIGHTS,
        lambda: (trial_matrix(torch.int64, device), trial_planes(planes, torch.int64, device)),
    )
    return True


def unpack_into(out: Tensor, packed: Tensor, bits: int = 2) -> Tensor:
    """Unpack into ``out`` [..., count] of any dtype, and return it."""
    return out.copy_(_unpacked(packed, out.shape[-1], bits))


def _unpacked(packed: Tensor, count: int, bits: int) -> Tensor:
    """Return int8 [..., count], possibly with gaps between rows."""
    words = _as_words(packed)
    # Move each code up to its byte's highest bits and back: the arithmetic shift extends the sign and drops
    # the codes below.
    shifts = torch.arange(8 - bits, -1, -bits, dtype=words.dtype, device=words.device)[:, None]
    values = (words.unsqueeze(-2) << shifts).view(torch.int8)
    values >>= 8 - bits
    if bits == 1:
        values |= 1
    return values.flatten(-2)[..., :count]


def _aligned(rows: Tensor) -> Tensor:
    """Make bytes contiguous, starting on a word boundary of their memory."""
    rows = rows.contiguous()
    return rows if rows.storage_offset() % _WORD == 0 else rows.clone()


def _as_words(rows: Tensor) -> Tensor:
    """Turn bytes into int64, which everything is faster with, where each row is whole words."""
    # Storage offsets are unknown while tracing, and Inductor vectorizes bytes by itself.
    if torch.compiler.is_compiling() or rows.numel() == 0 or rows.shape[-1] % _WORD != 0:
        return rows
    return _aligned(rows).view(torch.int64)


def count_zeros(packed: Tensor, count: int, bits: int = 2) -> Tensor:
    """Count the zeros among packed numbers, 0-dim int64."""
    if bits == 1:
        return torch.zeros((), dtype=torch.int64, device=packed.device)
    # The codes of 1 and −1 have the lower bit set, that of 0 has not.
    pairs = (packed & 0x11) + ((packed >> 2) & 0x11)
    return packed.shape[:-1].numel() * count - ((pairs & 0xF) + (pairs >> 4)).sum(dtype=torch.int64)


def to_base3(values: Tensor) -> Tensor:
    """Store ternary numbers of any shape as uint8 [⌈n/5⌉], five a byte: 1.6 bits each.

    The digits are the numbers plus 1, the first of five counting least.

    Raises:
        ValueError: another number.

    >>> to_base3(torch.tensor([[1, 0], [-1, 0], [1, -1]])).tolist()
    [194, 0]
    """
    check_values("values", values)
    digits = values.reshape(-1).to(torch.int16) + 1
    digits = torch.nn.functional.pad(digits, (0, -digits.numel() % _DIGITS))
    powers = torch.tensor([3**at for at in range(_DIGITS)], dtype=torch.int16, device=digits.device)
    return (digits.view(-1, _DIGITS) * powers).sum(1).to(torch.uint8)


def from_base3(code: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Return the int8 ternary numbers, of ``shape``, that :func:`to_base3` made ``code`` of.

    Raises:
        ValueError: ``code`` has another number of bytes than ``shape`` takes, or is not base 3.

    >>> from_base3(torch.tensor([194, 0], dtype=torch.uint8), (3, 2)).tolist()
    [[1, 0], [-1, 0], [1, -1]]
    """
    count = torch.Size(shape).numel()
    expected = -(-count // _DIGITS)
    if code.dtype != torch.uint8 or code.shape != (expected,):
        raise ValueError(
            f"{count} weights are {expected} bytes of uint8 in base 3, "
            f"got {code.dtype} of shape {tuple(code.shape)}"
        )
    if code.numel() and int(code.max()) >= 3**_DIGITS:
        raise ValueError(f"a byte of base-3 digits is at most {3**_DIGITS - 1}, got {int(code.max())}")
    wide = code.to(torch.int16)
    digits = torch.stack([(wide // 3**at) % 3 for at in range(_DIGITS)], dim=1)
    return (digits.view(-1)[:count] - 1).to(torch.int8).view(shape)
