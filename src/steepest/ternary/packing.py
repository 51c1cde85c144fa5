"""Ternary numbers in memory: 2 bits each to compute with, base 3 to store.

The 2-bit code is the number's own two's complement: 00 is 0, 01 is 1, 11 is −1, 10 is unused. A row of n
weights takes q = ⌈n/4⌉ bytes, and byte j holds the weights j, j + q, j + 2q, j + 3q, lowest bits first:
so each pair of bits, over all bytes of a row, is a contiguous piece of it (a *plane*), and packing and
unpacking are a few passes over whole words.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steepest.compile.available import wants_compiling
from steepest.compile.dynamic import run_dynamic, trial_matrix, trial_planes
from steepest.ternary.chunks import MOVES_WEIGHTS, row_pieces
from steepest.ternary.swar import splat

__all__ = [
    "check_packed",
    "check_ternary",
    "from_base3",
    "low_bits",
    "pack",
    "packed_width",
    "to_base3",
    "unpack",
    "zeros_in",
]

_TRITS = 5  # 3**5 = 243 fits a byte
_PLANES = 4
_WORD = 8
# Packing takes few calls a piece, so it may be large.
_PIECE = 4


def packed_width(count: int) -> int:
    """Bytes of a row of ``count`` weights.

    >>> [packed_width(count) for count in (0, 1, 4, 5)]
    [0, 1, 1, 2]
    """
    return (count + 3) // 4


def check_ternary(what: str, values: Tensor) -> None:
    """Raise ``ValueError`` unless every element is −1, 0 or 1."""
    # Compared in the tensor's own dtype: a conversion to int8 would take 0.5 and 257 for ternary.
    if values.numel() and not bool(((values == 0) | (values == 1) | (values == -1)).all()):
        raise ValueError(f"{what} must hold −1, 0 and 1 only")


def check_packed(what: str, packed: Tensor, count: int) -> None:
    """Raise ``ValueError`` unless these are ``count`` packed numbers a row, and no bits beyond them."""
    _check_layout(what, packed, count)
    if bool(((packed >> 1) & ~packed & 0x55).any()):
        raise ValueError(f"{what} holds the code 10, which stands for no number")
    filling = ~pack(torch.full((count,), -1, dtype=torch.int8, device=packed.device))
    if bool((packed & filling).any()):
        raise ValueError(f"{what} holds numbers beyond the {count} of a row")


def _check_layout(what: str, packed: Tensor, count: int) -> None:
    if count < 0:
        raise ValueError(f"the count of ternary numbers must be at least 0, got {count}")
    if packed.dtype != torch.uint8 or packed.dim() == 0 or packed.shape[-1] != packed_width(count):
        raise ValueError(
            f"{what}: {count} ternary numbers are {packed_width(count)} bytes of uint8 a row, "
            f"got {packed.dtype} of shape {tuple(packed.shape)}"
        )


def pack(values: Tensor, *, compile: bool = False) -> Tensor:
    """Pack int8 ternary numbers [..., n] into uint8 [..., ⌈n/4⌉].

    That the numbers are −1, 0 and 1 is not checked, which would take longer than packing: others give bytes
    that :func:`unpack` makes something else of.

    Args:
        values: the numbers.
        compile: by a graph of torch.compile, one for all sizes, where n is a multiple of 32; warns if there
            is no compiler. Making it takes seconds, which only those who pack thousands of times earn back.

    Raises:
        ValueError: another dtype, or no dimension.

    >>> pack(torch.tensor([[1, 0, -1, 0, 1]], dtype=torch.int8)).tolist()
    [[29, 0]]
    """
    if values.dtype != torch.int8 or values.dim() == 0:
        raise ValueError(
            f"pack() takes int8 of at least one dimension, got {values.dtype} of shape {tuple(values.shape)}"
        )
    count, leading = values.shape[-1], values.shape[:-1]
    width = packed_width(count)
    packed = torch.empty((leading.numel(), width), dtype=torch.uint8, device=values.device)
    rows = values.reshape(leading.numel(), count)
    if _compiles(compile, packed, rows):
        _run(_join, packed, _aligned(rows))
        return packed.view(*leading, width)
    for part in row_pieces(len(rows), count, values.device, _PIECE):
        piece = rows[part]
        if count < _PLANES * width:
            piece = torch.nn.functional.pad(piece, (0, _PLANES * width - count))
        planes = _as_words(piece.contiguous().view(torch.uint8).view(len(piece), _PLANES, width))
        _join(packed[part].view(planes.dtype), list(planes.unbind(1)))
    return packed.view(*leading, width)


def unpack(packed: Tensor, count: int, dtype: torch.dtype = torch.int8, *, compile: bool = False) -> Tensor:
    """Unpack uint8 [..., ⌈count/4⌉] into ternary numbers [..., count] of ``dtype``.

    Byte j of q holds the weights j, j + q, j + 2q and j + 3q, lowest bits first, each as two's complement.

    Args:
        packed: what :func:`pack` gives.
        count: numbers of a row.
        dtype: of the result.
        compile: as :func:`pack`'s.

    Raises:
        ValueError: another dtype, or rows that are not as wide as ``count`` numbers are.

    >>> unpack(torch.tensor([[29, 0]], dtype=torch.uint8), 5).tolist()
    [[1, 0, -1, 0, 1]]
    """
    _check_layout("unpack()", packed, count)
    if compile:
        rows = packed.reshape(packed.shape[:-1].numel(), packed.shape[-1])
        values = torch.empty((len(rows), count), dtype=torch.int8, device=packed.device)
        if _compiles(compile, rows, values):
            _run(_cut, _aligned(rows), values)
            return values.view(*packed.shape[:-1], count).to(dtype)
    return _unpacked(packed, count).to(dtype).contiguous()


def _join(packed: Tensor, planes: list[Tensor]) -> None:
    """Pack four planes of words, or of bytes."""
    code = splat(3, 8) if packed.dtype == torch.int64 else 3
    low = (planes[0] & code) | ((planes[1] & code) << 2)
    high = (planes[2] & code) | ((planes[3] & code) << 2)
    packed.copy_(low | (high << 4))


def _cut(packed: Tensor, planes: list[Tensor]) -> None:
    """Unpack words into four planes of words: compiled, since this many steps are slow eagerly."""
    for place, plane in enumerate(planes):
        code = packed >> (2 * place)
        minus = (code >> 1) & splat(1, 8)
        # The sign in all the higher bits of its byte.
        plane.copy_((code & splat(3, 8)) | ((minus << 8) - (minus << 2)))


def _compiles(option: bool, packed: Tensor, values: Tensor) -> bool:
    """Whether these rows go through a graph: as words, where there is a compiler."""
    (rows, width), (_, count) = packed.shape, values.shape
    # torch makes graphs of their own for a size of 1; who traces this has a graph of his own.
    whole = count == _PLANES * width and width % _WORD == 0 and min(rows, width // _WORD) > 1
    known = type(packed) is type(values) is Tensor and not torch.compiler.is_compiling()
    return option and whole and known and wants_compiling(True, values.numel(), values.device)


def _run(function: Callable[[Tensor, list[Tensor]], None], packed: Tensor, values: Tensor) -> None:
    """Run it compiled, over contiguous rows as words."""
    device = packed.device
    planes = values.view(torch.int64).view(len(values), _PLANES, -1).unbind(1)
    run_dynamic(
        (function, device),
        function,
        (packed.view(torch.int64), list(planes)),
        MOVES_WEIGHTS,
        lambda: (trial_matrix(torch.int64, device), trial_planes(_PLANES, torch.int64, device)),
    )


def unpack_into(out: Tensor, packed: Tensor) -> Tensor:
    """As :func:`unpack`, into ``out`` [..., count] of any dtype, which is returned."""
    return out.copy_(_unpacked(packed, out.shape[-1]))


def _unpacked(packed: Tensor, count: int) -> Tensor:
    """int8 [..., count], perhaps with gaps between rows."""
    words = _as_words(packed.contiguous())
    # Up to the sign bit and back: the arithmetic shift spreads it, and drops what came along.
    values = (words.unsqueeze(-2) << _shifts(words)).view(torch.int8)
    values >>= 6
    return values.flatten(-2)[..., :count]


def _shifts(like: Tensor) -> Tensor:
    """From each plane's pair of bits up to a byte's highest."""
    return torch.arange(6, -1, -2, dtype=like.dtype, device=like.device)[:, None]


def _aligned(rows: Tensor) -> Tensor:
    """Contiguous, and beginning with a whole word of its memory."""
    rows = rows.contiguous()
    return rows if rows.storage_offset() % _WORD == 0 else rows.clone()


def _as_words(rows: Tensor) -> Tensor:
    """Contiguous bytes as int64, with which everything is faster, where each row is whole words."""
    # Who traces this does not get to know where memory begins, and makes vectors of bytes by himself.
    if torch.compiler.is_compiling() or rows.numel() == 0 or rows.shape[-1] % _WORD != 0:
        return rows
    return rows.view(torch.int64) if rows.storage_offset() % _WORD == 0 else rows


def zeros_in(packed: Tensor, count: int) -> Tensor:
    """How many of the weights are 0, as a 0-dim int64 tensor: their code has no lowest bit.

    >>> int(zeros_in(torch.tensor([[29, 0]], dtype=torch.uint8), 5))
    2
    """
    return packed.shape[:-1].numel() * count - low_bits(packed)


def low_bits(packed: Tensor) -> Tensor:
    """How many pairs of bits have the lower one set, as a 0-dim int64 tensor.

    >>> int(low_bits(torch.tensor([0b01_11_00_10], dtype=torch.uint8)))
    2
    """
    pairs = (packed & 0x11) + ((packed >> 2) & 0x11)
    return ((pairs & 0xF) + (pairs >> 4)).sum(dtype=torch.int64)


def to_base3(values: Tensor) -> Tensor:
    """Ternary numbers of any shape as uint8 [⌈n/5⌉], five a byte: 1.6 bits each, to store or to send.

    The digits are the numbers plus 1, the first of five counting least.

    Raises:
        ValueError: another number.

    >>> to_base3(torch.tensor([[1, 0], [-1, 0], [1, -1]])).tolist()
    [194, 0]
    """
    check_ternary("values", values)
    digits = values.reshape(-1).to(torch.int16) + 1
    digits = torch.nn.functional.pad(digits, (0, -digits.numel() % _TRITS))
    powers = torch.tensor([3**at for at in range(_TRITS)], dtype=torch.int16, device=digits.device)
    return (digits.view(-1, _TRITS) * powers).sum(1).to(torch.uint8)


def from_base3(code: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The int8 ternary numbers, of ``shape``, that :func:`to_base3` made ``code`` of.

    Raises:
        ValueError: ``code`` has not the bytes that ``shape`` takes, or holds no base-3 digits.

    >>> from_base3(torch.tensor([194, 0], dtype=torch.uint8), (3, 2)).tolist()
    [[1, 0], [-1, 0], [1, -1]]
    """
    count = torch.Size(shape).numel()
    if code.dtype != torch.uint8 or code.shape != ((count + _TRITS - 1) // _TRITS,):
        raise ValueError(
            f"{count} weights are {(count + _TRITS - 1) // _TRITS} bytes of uint8 in base 3, "
            f"got {code.dtype} of shape {tuple(code.shape)}"
        )
    if code.numel() and int(code.max()) >= 3**_TRITS:
        raise ValueError(f"a byte of base-3 digits is at most {3**_TRITS - 1}, got {int(code.max())}")
    wide = code.to(torch.int16)
    digits = torch.stack([(wide // 3**at) % 3 for at in range(_TRITS)], dim=1)
    return (digits.view(-1)[:count] - 1).to(torch.int8).view(shape)
