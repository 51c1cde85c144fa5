"""Keep the memory of large temporaries on a CPU from one use to the next.

The system hands out large blocks page by page and empty, and takes them back when they are freed. A step that
allocates 50 MB anew spends up to a quarter of its time there. Accelerators' allocators keep their memory
anyway.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["KEPT_BYTES", "borrow", "give_back"]

KEPT_BYTES = 1 << 26
"""The most memory that is kept, per thread: beside larger temporaries' products, pages do not matter."""

# glibc serves smaller blocks from memory that it keeps itself.
_SMALLEST = 1 << 18


class _Kept(threading.local):
    def __init__(self) -> None:
        self.blocks: list[Tensor] = []  # flat, the longest unused first


_kept = _Kept()


def borrow(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialized contiguous tensor, in memory that was given back if there is some."""
    if device.type == "cpu":
        numel = math.prod(shape)
        blocks = _kept.blocks
        for at in range(len(blocks) - 1, -1, -1):
            if blocks[at].dtype == dtype and blocks[at].numel() == numel:
                return blocks.pop(at).view(*shape)
    return torch.empty(*shape, dtype=dtype, device=device)


def give_back(*tensors: Tensor) -> None:
    """Keep the memory of contiguous tensors that nobody uses any more."""
    blocks = _kept.blocks
    for tensor in tensors:
        if (
            tensor.device.type == "cpu"
            and not tensor.is_inference()
            and _SMALLEST <= tensor.nbytes <= KEPT_BYTES
        ):
            blocks.append(tensor.view(-1))
    while sum([block.nbytes for block in blocks]) > KEPT_BYTES:
        del blocks[0]
