"""explain() shows how parameters are sharded and who computes their matrices, without communication."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.nn import Parameter

import steepest

from .ranks import alone_as, placed

TABLE = """\
tensor           shape  rule   lr     decay  view  layout         owner  why
------------------------------------------------------------------------------------------------------------
layers.*.w (10)  16×8   muon   0.001  0.01         Shard(0) of 8  0–7    set by hand
norm             16     adamw  0.001  0.01         Shard(0) of 8         set by hand
plain            3      adamw  0.001  0.01         whole                 set by hand
"""
# Each process has 2 of 16 rows and sends them to the owners of ten matrices; two processes own two, which
# they send back. The mean of what an owner sends back is 10/8 of a matrix less its own rows. Each of eight
# owners tells seven others whether it has failed.
THERE, BACK = 10 * 2 * 8 * 4 * 7 // 8, 10 * 14 * 8 * 4 // 8
NOTE = "8 processes share 10 matrices in 1 wave: max/mean load 1.60, and each sends {} a step (at most {})"


def make(
    mesh_shape: tuple[int, ...], placements: tuple[Placement, ...], **options: Any
) -> steepest.Optimizer:
    mesh = init_device_mesh("cpu", mesh_shape)
    params = [Parameter(placed(torch.ones(16, 8), mesh, placements)) for _ in range(10)]
    vectors = [Parameter(placed(torch.ones(16), mesh, placements)), Parameter(torch.ones(3))]
    groups = [
        {"params": [(f"layers.{at}.w", param) for at, param in enumerate(params)], **options},
        {"params": list(zip(("norm", "plain"), vectors, strict=True)), "rule": "adamw"},
    ]
    return steepest.Optimizer(groups, rule="muon")


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no collective begin."""

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a collective")

    for name in ("all_reduce", "all_gather", "all_to_all_single", "broadcast", "barrier", "new_group"):
        monkeypatch.setattr(dist, name, refuse)


def test_the_table_and_the_note_before_the_first_step(silence: None):
    with alone_as(1, 8):
        optimizer = make((8,), (Shard(0),))
        explained = optimizer.explain()
        repr(optimizer)
    assert explained.table(108).startswith(TABLE)
    # A process that owns two matrices sends two back; in the mean THERE and BACK.
    mean = THERE + BACK + 7 * 8
    most = 8 * 2 * 8 * 4 + 2 * 14 * 8 * 4 + 7 * 8
    assert explained.notes[-1] == NOTE.format(f"{mean / 1024:.1f} KiB", f"{most / 1024:.1f} KiB")
    assert [row.owners for row in explained.rows] == [(at % 8,) for at in range(10)] + [(), ()]


def test_every_rank_explains_the_same(silence: None):
    tables = set()
    for rank in range(4):
        with alone_as(rank, 4):
            tables.add(str(make((4,), (Shard(1),)).explain()))
    assert len(tables) == 1


@pytest.mark.parametrize(
    ("mesh", "placements", "layout"),
    [
        ((2, 4), (Replicate(), Shard(0)), "Replicate × Shard(0) of 2×4"),
        ((2, 4), (Shard(0), Shard(1)), "Shard(0) × Shard(1) of 2×4"),
        ((8,), (Replicate(),), "replicated"),
    ],
)
def test_the_layout_of_a_mesh(
    mesh: tuple[int, ...], placements: tuple[Placement, ...], layout: str, silence: None
):
    with alone_as(0, 8):
        rows = make(mesh, placements).explain().rows
    assert rows[0].layout == layout
    assert rows[-1].layout is None
    assert bool(rows[0].owners) == (layout != "replicated")


def test_everywhere_has_no_owner(silence: None):
    with alone_as(0, 8):
        explained = make((8,), (Shard(0),), distributed="everywhere").explain()
    assert explained.rows[0].owners == ()
    assert "max/mean load 1.00" in explained.notes[-1]


def test_plain_parameters_whose_work_is_shared_have_owners(silence: None):
    with alone_as(0, 8):
        params = [Parameter(torch.ones(4, 4)) for _ in range(8)]
        rows = steepest.Muon(params, distributed="owners").explain().rows
        assert [row.owners for row in rows] == [(at,) for at in range(8)]
        assert {row.layout for row in rows} == {None}


def test_the_default_device_does_not_matter(silence: None):
    with alone_as(0, 8):
        optimizer = make((8,), (Shard(0),))
        with torch.device("meta"):
            assert "8 processes share" in str(optimizer.explain())


def test_tables_of_plain_optimizers_are_as_before():
    table = str(steepest.Muon([Parameter(torch.ones(4, 4))]).explain())
    assert "layout" not in table
    assert "owner" not in table
