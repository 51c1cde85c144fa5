"""Divide a layer's rows among the ranks: each keeps the accumulators of its own rows, and flips those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from steepest.distributed.local import is_dtensor, local_part
from steepest.hyperparameters import StateDtype
from steepest.rule import StateSpec
from steepest.ternary.ranks import Group, all_reduce, rank_and_world_size

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["WHOLE", "AccumulatorRows", "Part", "Rows", "find_rows"]


class Part:
    """The part of a layer that this process flips. Here all of it; :class:`Rows` is one of several parts."""

    @property
    def first(self) -> int:
        """The index in the layer of the part's first weight, since noise is keyed by that."""
        return 0

    def total(self, counts: Tensor) -> Tensor:
        """Sum counts over all parts."""
        return counts

    def of_all(self, numbers: Tensor) -> Tensor:
        """Return the numbers ≥ 0 of all parts, and perhaps some −1, in a vector."""
        return numbers


WHOLE = Part()


@dataclass(frozen=True)
class Rows(Part):
    """This rank's rows of a layer, perhaps none: those of a DTensor with the placement Shard(0).

    Sums and what is shared are collectives: all ranks call them, in the same order.
    """

    group: Group
    rank: int
    world_size: int
    rows: int
    columns: int

    @property
    def height(self) -> int:
        """The largest number of rows that a rank has."""
        return -(-self.rows // self.world_size)

    @property
    def own(self) -> slice:
        """The rows of this rank."""
        return self._of(self.rank)

    @property
    def first(self) -> int:
        """The index in the layer of the first own weight."""
        return int(self.own.start) * self.columns

    def total(self, counts: Tensor) -> Tensor:
        """Sum counts over all ranks."""
        return all_reduce(self.group, counts.clone())

    def of_all(self, numbers: Tensor) -> Tensor:
        """Return the numbers ≥ 0 of all ranks, and some −1 where ranks have fewer than others."""
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=numbers.device)
        sizes[self.rank] = len(numbers)
        most = int(self.total(sizes).max())
        sent = torch.nn.functional.pad(numbers, (0, most - len(numbers)), value=-1)
        return self._gather(sent).view(-1)

    def sum_votes(self, votes: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum all ranks' votes, of one dtype, for the own rows in ``dtype``: a reduce-scatter."""
        row = self.columns * votes.itemsize
        sizes = [row * (held.stop - held.start) for held in map(self._of, range(self.world_size))]
        own = self.own.stop - self.own.start
        # As bytes, since neither gloo nor NCCL sends int16. Sums of integers know no order.
        found = torch.empty(self.world_size * own * row, dtype=torch.uint8, device=votes.device)
        sent = votes.contiguous().view(-1).view(torch.uint8)
        dist.all_to_all_single(found, sent, [own * row] * self.world_size, sizes, group=self.group or None)
        return found.view(votes.dtype).view(self.world_size, own, self.columns).sum(0, dtype=dtype)

    def share(self, packed: Tensor, flips: Tensor) -> Tensor:
        """Write all ranks' rows of T into ``packed``; return the sum of their flips."""
        width = packed.shape[1]
        # The count travels with the rows.
        sent = packed.new_zeros(self.height * width + flips.itemsize)
        own = packed[self.own].reshape(-1)
        sent[: len(own)] = own
        sent[-flips.itemsize :] = flips.view(1).view(torch.uint8)
        found = self._gather(sent)
        packed.copy_(found[:, : -flips.itemsize].reshape(-1, width)[: self.rows])
        return found[:, -flips.itemsize :].contiguous().view(flips.dtype).sum()

    def part_of(self, whole: Tensor) -> DTensor:
        """Cut a whole accumulator, which is copied."""
        return self.sharded(whole[self.own].clone())

    def sharded(self, local: Tensor) -> DTensor:
        """Wrap the accumulators of the own rows in a DTensor, which distributed checkpoints reshard."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        group = self.group or dist.group.WORLD
        assert group is not None
        mesh = DeviceMesh.from_group(group, local.device.type)
        shape = torch.Size((self.rows, self.columns))
        return DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=shape, stride=(self.columns, 1)
        )

    def fits(self, accumulator: Tensor) -> bool:
        """Tell whether an accumulator is divided as these rows are."""
        return is_dtensor(accumulator) and (
            accumulator.device_mesh.size() == self.world_size
            and [getattr(each, "dim", None) for each in accumulator.placements] == [0]
            and len(local_part(accumulator)) == self.own.stop - self.own.start
        )

    def _of(self, rank: int) -> slice:
        return slice(min(rank * self.height, self.rows), min((rank + 1) * self.height, self.rows))

    def _gather(self, sent: Tensor) -> Tensor:
        """Stack the ranks' vectors of one length."""
        found = sent.new_empty(self.world_size, len(sent))
        # The name since torch 2.13, where the other one warns.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(found.view(-1), sent, group=self.group or None)
        return found


def find_rows(group: Group, shape: tuple[int, int]) -> Rows | None:
    """Divide the rows of a layer among the ranks of a group; None if there is one rank."""
    rank, world_size = rank_and_world_size(group)
    return Rows(group, rank, world_size, *shape) if world_size > 1 else None


@dataclass(frozen=True)
class AccumulatorRows(StateSpec):
    """An accumulator of which this rank keeps its own rows."""

    rows: Rows | None = None
    device: torch.device | None = None

    def make(self, param: Tensor, state_dtype: StateDtype = None) -> Tensor:
        """Return the zeros of the own rows; on the meta device the whole accumulator."""
        if self.rows is None or param.is_meta:
            return super().make(param, state_dtype)
        own = self.rows.own
        shape = own.stop - own.start, self.rows.columns
        return self.rows.sharded(torch.zeros(shape, dtype=self.dtype, device=self.device))
