"""Units cut parameters without gaps or overlaps, and cutting and placing is the identity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.nn import Parameter

import steepest
from steepest import views
from steepest.distributed.layout import layout_of
from steepest.distributed.ownership import Load, assign, balance, is_empty, overlap, team_size, waves
from steepest.engine.units import Sharding, Way
from steepest.planning.sharded import _PaperMesh


@st.composite
def cases(draw: Any) -> tuple[list[tuple[int, ...]], tuple[int, ...], list[Placement], dict[str, Any]]:
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    placements = [draw(st.sampled_from([Shard(0), Shard(1), Replicate()])) for _ in mesh]
    shapes = draw(
        st.lists(st.lists(st.integers(1, 17), min_size=2, max_size=3).map(tuple), min_size=1, max_size=4)
    )
    own = {}
    for at, shape in enumerate(shapes):
        kind = draw(st.sampled_from(["whole", "rows", "columns", "transposed", "transposed columns"]))
        size = shape[1] if "columns" in kind else shape[0]
        first = draw(st.integers(1, size - 1)) if size > 1 else size
        sizes = (first, size - first) if size > first else (size,)
        if "columns" in kind or kind == "rows":
            cut = (views.columns if "columns" in kind else views.rows)(*sizes)
            own[f"w{at}"] = views.transposed(cut) if "transposed" in kind else cut
        elif kind == "transposed":
            own[f"w{at}"] = views.transposed()
    options = {"view": draw(st.sampled_from(["flatten", "batch"])), "views": own or None}
    return shapes, mesh, placements, options


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans())
def test_cutting_and_placing_is_the_identity(case: Any, everywhere: bool):
    shapes, mesh, placements, options = case
    params = [Parameter(torch.arange(math.prod(shape)).view(shape).float()) for shape in shapes]
    optimizer = steepest.Muon([(f"w{at}", param) for at, param in enumerate(params)], **options)
    # Any rank makes the same units.
    paper = _PaperMesh(mesh, math.prod(mesh) - 1)
    cut_by = tuple(dim for dim, each in enumerate(placements) if not each.is_replicate())

    def way_of(param: Any, group: Any) -> Any:
        mode = "everywhere" if everywhere else "owners"
        return Way(paper, cut_by, math.prod(mesh), mode), layout_of(
            tuple(param.shape), mesh, tuple(placements)
        )

    try:
        sharding = Sharding()
        sharding.make(optimizer.param_groups, lambda config: False, way_of)
    except ValueError as error:
        if "unevenly" not in str(error):  # a layout that torch itself leaves open
            raise
        return
    for param in params:
        units = sharding.of(param)
        if units is None:
            assert not sharding.teams or math.prod(mesh) == 1
            continue
        seen = torch.zeros(param.shape)
        for unit in units:
            team = unit.team
            target = team.own if unit.owner is None else unit.owner
            matrix = torch.full(unit.kind.shape, -1.0)
            for at in range(len(team)):
                if target in unit.receivers(at) and not is_empty(unit.parts[at]):
                    unit.within(matrix, unit.parts[at]).copy_(unit.parts[at].of(param.detach()))
            assert torch.equal(unit.whole(matrix), unit.box.of(param.detach()))
            # Noise is drawn by these places.
            places = unit.extent.places(unit.shape).view(unit.kind.shape)
            assert torch.equal(places.float(), matrix)
            unit.box.of(seen).add_(1)
            for at in range(len(team)):
                assert overlap(unit.box, unit.parts[at]).shape == unit.parts[at].shape
        assert seen.eq(1).all()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 3)), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(1, 12),
)
def test_waves_take_each_matrix_once_and_fill_no_bucket_beyond_its_size(
    drawn: list[tuple[int, int]], ranks: int, room: int
):
    loads = [Load(float(cost)) for cost, _ in drawn]
    fill = [size / room for _, size in drawn]
    owners = assign(loads, ranks)
    found = waves(owners, loads, fill)
    assert sorted(at for wave in found for at in wave) == list(range(len(loads)))
    for wave in found:
        for rank in range(ranks):
            own = [at for at in wave if owners[at] == rank]
            assert len(own) <= 1 or sum(fill[at] for at in own) <= 1 + 1e-9
            later = [at for other in found[found.index(wave) + 1 :] for at in other if owners[at] == rank]
            assert not own or all(loads[at].cost >= loads[b].cost for at in own for b in later)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 9))
def test_no_owner_has_more_than_the_mean_and_one_matrix(costs: list[int], ranks: int):
    """Graham's bound: whoever has the most was the least loaded when it got its last matrix."""
    loads = [Load(float(cost)) for cost in costs]
    owners = assign(loads, ranks)
    assert len(owners) == len(costs)
    mean = sum(costs) / ranks
    assert balance(owners, loads, ranks) * mean <= mean + (1 - 1 / ranks) * max(costs) + 1e-9


def test_owners_that_are_known_stay():
    loads = [Load(4.0), Load(3.0), Load(2.0), Load(1.0)]
    first = assign(loads[:2], 2)
    assert assign(loads, 2, [*first, None, None])[:2] == first
    assert assign([Load(1.0)] * 3, 3, [2, 2, None]) == [2, 2, 0]


@pytest.mark.parametrize(
    ("replicas", "shards", "matrices", "size"),
    [(1, 8, 3, 1), (8, 1, 3, 2), (8, 1, 100, 8), (6, 4, 12, 3), (6, 4, 13, 3), (6, 4, 3, 1)],
)
def test_team_sizes(replicas: int, shards: int, matrices: int, size: int):
    assert team_size(replicas, shards, matrices) == size


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("rule", ["muon", "normuon", "polargrad", "quad"])
def test_shards_stepped_by_themselves_would_be_far_off(rule: str, ranks: int):
    """The negative control: what a matrix rule does that takes a shard for the matrix."""
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(256, 64, generator=generator) for _ in range(2))

    def stepped(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        param = Parameter(weight.clone())
        param.grad = grad.clone()
        steepest.create(rule, [param], lr=1.0, weight_decay=0.0).step()
        return param.detach() - weight

    whole = stepped(start, grad)
    shards = torch.cat(list(map(stepped, start.chunk(ranks), grad.chunk(ranks))))
    assert (shards - whole).norm() / whole.norm() > 0.1
