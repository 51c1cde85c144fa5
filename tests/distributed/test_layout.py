"""Which part of a tensor each process holds, against what torch distributes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import steepest
from steepest.distributed.layout import layout_of
from steepest.distributed.local import region_of

from .ranks import LAYOUTS, alone_as, placed, run_on_ranks

SHAPES = [(8, 6), (7, 5), (3, 2), (1, 9), (0, 4), (5,), (2,), (), (4, 3, 5)]
MESHES: list[tuple[tuple[int, ...], tuple[Placement, ...]]] = [
    *LAYOUTS.values(),
    ((2, 3), (_StridedShard(0, split_factor=3), Shard(0))),
    ((2, 2, 2), (Replicate(), _StridedShard(0, split_factor=2), Shard(0))),
    ((2, 3, 2), (Shard(1), Replicate(), Shard(0))),
    ((5,), (Shard(0),)),
]


@pytest.mark.parametrize(("mesh_shape", "placements"), MESHES, ids=str)
def test_regions_are_what_torch_gives_each_rank(mesh_shape, placements):
    world = math.prod(mesh_shape)
    for rank in range(world):
        with alone_as(rank, world):
            mesh = init_device_mesh("cpu", mesh_shape)
            for shape in SHAPES:
                whole = torch.arange(math.prod(shape)).view(shape)
                given = placed(whole, mesh, placements)
                try:
                    region = region_of(given)
                except ValueError:
                    # What is refused is cut twice along one dimension, in parts that are not equal.
                    assert any(isinstance(each, _StridedShard) for each in given.placements)
                    assert shape[0] % world
                    continue
                assert torch.equal(region.of(whole), given.to_local())


def test_uneven_parts_that_fsdp_and_tp_place_differently_are_refused_whole():
    """The placements give row 8 to a rank whose local tensor has none."""
    placements = (_StridedShard(0, split_factor=2), Shard(0))
    with pytest.raises(ValueError, match="unevenly"):
        layout_of((9, 3), (4, 2), placements)
    assert layout_of((8, 3), (4, 2), placements).region((3, 1)) == ((7, 0), (1, 3))
    # All other sizes up to 17 are either refused or cover each row once.
    for size in range(18):
        try:
            layout = layout_of((size,), (4, 2), placements)
        except ValueError:
            continue
        rows = [layout.region(at) for at in itertools.product(range(4), range(2))]
        assert sorted(i for (first,), (n,) in rows for i in range(first, first + n)) == list(range(size))


def test_what_is_in_several_pieces_is_refused():
    with pytest.raises(ValueError, match="unevenly"):
        layout_of((8,), (2,), (_StridedShard(0, split_factor=2),))


def test_partial_parameters_and_wrong_local_tensors_are_refused_by_name():
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        partial = DTensor.from_local(torch.ones(4), mesh, [Partial()])
        with pytest.raises(ValueError, match=r"'w' is a DTensor that has the placement P\(sum\)"):
            steepest.Lion([("w", torch.nn.Parameter(partial))])
        wrong = DTensor.from_local(
            torch.ones(3), mesh, [Shard(0)], run_check=False, shape=torch.Size([4]), stride=(1,)
        )
        with pytest.raises(ValueError, match=r"'w' is a DTensor whose local tensor has shape \(3,\)"):
            steepest.Lion([("w", torch.nn.Parameter(wrong))])

    run_on_ranks(work, 2)
