"""A checksum of packed weights, by which a change of their bytes shows."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.ternary.chunks import row_chunks

__all__ = ["checksum"]

_WORD = 4


def checksum(packed: Tensor) -> Tensor:
    """Return 64 bits, 0-dim int64, that differ for layers that differ, almost certainly.

    A change in one place always shows. The higher bits depend on more of the bytes than the lower ones.

    >>> one, other = (torch.tensor(codes, dtype=torch.uint8) for codes in ([1, 2], [2, 1]))
    >>> torch.equal(checksum(one), checksum(one.clone())), torch.equal(checksum(one), checksum(other))
    (True, False)
    """
    flat = packed.reshape(-1)
    if flat.numel() % _WORD != 0 or flat.storage_offset() % _WORD != 0:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % _WORD))  # a copy
    words = flat.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=packed.device)
    for part in row_chunks(len(words), 1, packed.device):
        # No small combination of these factors is zero, and odd ones lose no bits. Products and sums wrap
        # around.
        factors = torch.arange(part.start + 1, part.stop + 1, device=packed.device).mul_(0x1E3779B97F4A7C15)
        factors ^= factors >> 31
        total += factors.bitwise_or_(1).mul_(words[part]).sum()
    return total
