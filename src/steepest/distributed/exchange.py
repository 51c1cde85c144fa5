"""Exchange tensors of any shapes and dtypes between the processes of a group, in one all-to-all of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Parcels", "Piece", "Transfer", "send"]


class Piece(NamedTuple):
    """A tensor on its way."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class Parcels:
    """The tensors for, or from, each rank of a group, one after the other in one buffer.

    ``tensors[rank]`` are its pieces: to be written before :meth:`seal`, or read after :meth:`unpack`.

    >>> parcels = Parcels([[Piece((2,), torch.float32)], [Piece((), torch.int8), Piece((1,), torch.int64)]])
    >>> parcels.splits, parcels.buffer.numel()
    ([8, 9], 17)
    """

    def __init__(self, pieces: Sequence[Sequence[Piece]], device: torch.device | str = "cpu") -> None:
        self.splits = [sum([piece.nbytes for piece in each]) for each in pieces]
        self.buffer = torch.empty(sum(self.splits), dtype=torch.uint8, device=device)
        self.tensors: list[list[Tensor]] = []
        # Pieces that do not start at a multiple of their element's size have memory of their own.
        self._apart: list[tuple[Tensor, Tensor]] = []
        start = 0
        for each in pieces:
            own = []
            for shape, dtype in each:
                nbytes = math.prod(shape) * dtype.itemsize
                place = self.buffer[start : start + nbytes]
                if start % dtype.itemsize == 0:
                    own.append(place.view(dtype).view(shape))
                else:
                    own.append(torch.empty(shape, dtype=dtype, device=device))
                    self._apart.append((place, own[-1]))
                start += nbytes
            self.tensors.append(own)

    def seal(self) -> None:
        """Finish writing."""
        for place, apart in self._apart:
            place.copy_(apart.reshape(-1).view(torch.uint8))

    def unpack(self) -> None:
        """Begin reading."""
        for place, apart in self._apart:
            apart.reshape(-1).view(torch.uint8).copy_(place)


class Transfer:
    """An exchange under way."""

    def __init__(self, work: Any, sent: Parcels, received: Parcels) -> None:
        self._work, self._sent, self._received = work, sent, received

    def wait(self) -> list[list[Tensor]]:
        """Wait for it; return what each rank has sent."""
        if self._work is not None:
            self._work.wait()
        self._received.unpack()
        return self._received.tensors


def send(group: ProcessGroup | None, sent: Parcels, received: Parcels) -> Transfer:
    """Begin to send parcels to the ranks of a group; None if nobody sends anything to another one."""
    sent.seal()
    if group is None:
        return Transfer(None, sent, sent)
    work = dist.all_to_all_single(
        received.buffer, sent.buffer, received.splits, sent.splits, group=group, async_op=True
    )
    return Transfer(work, sent, received)
