"""Plans without processes: of the paper's table, of real steps, and the same on all ranks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.nn import Parameter

import steepest
from steepest.distributed.ownership import is_empty
from steepest.model_shapes import model_shapes
from steepest.planning import plan_sharded

from .ranks import LAYOUTS, alone_as, placed, run_on_ranks

R, S = Replicate(), Shard(0)
LLAMA = [(tensor.name, tensor.shape) for tensor in model_shapes("llama-70b").hidden()]
# ms on devices of 500 TFLOP/s with links of 360 GB/s within a node of 8 and of 45 GB/s outside: replicas that
# share the work, compute, exchange in float32, in bfloat16.
TABLE = {
    (8,): (1, 2511, 166, 83),
    (64,): (1, 317, 166, 83),
    (8, 8): (8, 317, 676, 338),
    (512,): (1, 62, 23, 12),
    (8, 64): (8, 62, 104, 52),
    (8, 512): (1, 62, 23, 12),
    (64, 64): (8, 62, 104, 52),
}
MIXED = [("a", (24, 16)), ("b", (24, 16)), ("c", (10, 30)), ("d", (7, 5)), ("e", (3, 9, 9)), ("f", (40, 8))]


OPTIONS: list[dict[str, Any]] = [{}, {"bucket_bytes": 30_000}, {"distributed": "everywhere"}]


def test_a_llama_of_70b_has_560_matrices():
    assert len(LLAMA) == 560
    assert round(sum(a * b for _, (a, b) in LLAMA) / 1e9, 1) == 68.5


@pytest.mark.parametrize("mesh", TABLE)
def test_the_table_of_a_llama(mesh: tuple[int, ...]):
    placements = (R, S)[-len(mesh) :]
    plan = plan_sharded(LLAMA, mesh, placements, node=8)
    half = plan_sharded(LLAMA, mesh, placements, node=8, exchange_dtype=torch.bfloat16)
    times = plan.compute_seconds(500e12), *(p.exchange_seconds(360e9, 45e9) for p in (plan, half))
    assert (plan.replicas, *(round(1e3 * seconds) for seconds in times)) == TABLE[mesh]
    # Where every process computes everything.
    assert round(1e3 * sum(unit.cost for unit in plan.units) / 500e12) == 20087
    # The mean of what is sent, each process's own part included, is N·e/(g·S) + N·e/S.
    elements, shards, team = sum(a * b for _, (a, b) in LLAMA), plan.shards, len(plan.work.team)
    own = 4 * elements / team * (1 / shards + 1 / shards)
    assert plan.sent + own == pytest.approx(4 * elements * (1 / team + 1 / shards), rel=2e-3)


def test_the_balance_of_a_llama():
    found = [plan_sharded(LLAMA, (ranks,), (S,)).work.balance for ranks in (8, 64, 512)]
    assert [round(each, 2) for each in found] == [1.0, 1.01, 1.57]


@pytest.mark.parametrize("mesh", [(64, 64), (8, 512)])
def test_the_teams_of_4096_ranks_agree(mesh: tuple[int, int]):
    first = plan_sharded(LLAMA, mesh, (R, S))
    size = len(first.work.team)
    assert size == first.replicas * mesh[1]
    for rank in (1, mesh[1] - 1, size, 2049, 4095):
        plan = plan_sharded(LLAMA, mesh, (R, S), rank=rank)
        start = rank // size * size
        assert plan.work.team.ranks == tuple(range(start, start + size))
        assert plan.work.team.ranks[plan.work.team.own] == rank
        owners = [unit.owner - start for unit in plan.units if unit.owner is not None]
        assert owners == [unit.owner for unit in first.units]
        assert torch.equal(plan.work.sent, first.work.sent)


def optimizer_on(mesh_shape: tuple[int, ...], placements: Any, shapes: Any, **options: Any) -> Any:
    mesh = init_device_mesh("cpu", mesh_shape)
    named = []
    for at, (name, shape) in enumerate(shapes):
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(at))
        param = Parameter(placed(whole, mesh, placements))
        param.grad = placed(whole, mesh, placements)
        named.append((name, param))
    return steepest.Muon(named, **options)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        *((name, options) for name in LAYOUTS if name != "replicated" for options in OPTIONS),
        ("replicated", {"distributed": "owners"}),
    ],
    ids=str,
)
def test_a_plan_is_what_a_step_does(layout: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    mesh, placements = LAYOUTS[layout]
    plan = plan_sharded(MIXED, mesh, placements, view="batch", **options)
    sent = dict.fromkeys(range(4), 0)
    calls = dict.fromkeys(range(4), 0)
    lock, real = threading.Lock(), dist.all_to_all_single

    def counting(output: Any, given: Any, there: Any, here: Any, group: Any, **how: Any) -> Any:
        own = dist.get_rank()
        at = dist.get_process_group_ranks(group).index(own)
        with lock:
            sent[own] += sum(here) - here[at]
            calls[own] += 1
        return real(output, given, there, here, group=group, **how)

    monkeypatch.setattr(dist, "all_to_all_single", counting)

    def work(rank: int) -> list[tuple[int, ...]]:
        optimizer = optimizer_on(mesh, placements, MIXED, view="batch", **options)
        explained = optimizer.explain()
        optimizer.step()
        assert [row.owners for row in explained.rows] == [row.owners for row in optimizer.explain().rows]
        return [row.owners for row in explained.rows]

    owners = run_on_ranks(work)[0]
    assert [sent[rank] for rank in plan.work.team.ranks] == plan.work.sent.tolist()
    assert max(calls.values()) <= 2 * plan.work.waves
    for (name, _), ranks in zip(MIXED, owners, strict=True):
        own = {unit.owner for unit in plan.units if unit.name == name} - {None}
        assert ranks == tuple(sorted(own))


def test_in_terms_of_one_batch_cut_along_it_nothing_travels():
    plan = plan_sharded([("experts", (8, 6, 5))], (4,), (S,), view="batch")
    assert plan.work.sent.tolist() == [0, 0, 0, 0]
    assert plan.work.balance == 1


@pytest.mark.parametrize(
    ("mesh", "placements"),
    [
        ((8,), (S,)),
        ((6, 12), (R, S)),
        ((2, 4), (R, S)),
        ((4, 2), (R, Shard(1))),
        ((3, 2, 2), (R, S, Shard(1))),
        ((36,), (S,)),
    ],
    ids=str,
)
def test_ranks_agree_and_their_routes_fit_together(
    mesh: tuple[int, ...], placements: Any, monkeypatch: pytest.MonkeyPatch
):
    """Each rank by itself, without the others: what it would send and expects to receive."""
    world = torch.tensor(mesh).prod().item()
    sent: dict[tuple[Any, int], list[list[int]]] = {}
    received: dict[tuple[Any, int], list[list[int]]] = {}

    def recording(output: Any, given: Any, there: Any, here: Any, group: Any, **how: Any) -> Any:
        output.zero_()
        ranks, own = tuple(dist.get_process_group_ranks(group)), dist.get_rank()
        sent.setdefault((ranks, own), []).append(list(here))
        received.setdefault((ranks, own), []).append(list(there))
        return type("Done", (), {"wait": lambda self: None})()

    monkeypatch.setattr(dist, "all_to_all_single", recording)
    plans: dict[tuple[int, ...], list[Any]] = {}
    # 24 matrices, so that replicas of 12 share the work by pairs.
    shapes = [(f"{name}{copy}", shape) for copy in range(3) for name, shape in MIXED]

    def be(rank: int) -> None:
        with alone_as(rank, world):
            optimizer = optimizer_on(mesh, placements, shapes, view="batch", bucket_bytes=30_000)
            optimizer.step()
            sharding = optimizer._collector.sharding(optimizer.param_groups, optimizer._user_functions)
            ((team, units),) = sharding.teams.items()
            assert team.ranks[team.own] == rank
            plans.setdefault(team.ranks, []).append([(unit.owner, unit.parts) for _, unit in units])
            for _, unit in units:
                assert_covered_once(team, unit)

    for rank in range(world):
        # DTensor caches meshes, which know their rank, in each thread.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(be, rank).result()
    assert sorted(rank for ranks in plans for rank in ranks) == list(range(world))
    for ranks, found in plans.items():
        assert len(found) == len(ranks)
        assert all(each == found[0] for each in found)
        calls = {len(sent[ranks, rank]) for rank in ranks}
        assert len(calls) == 1
        for call in range(*calls):
            there = torch.tensor([sent[ranks, rank][call] for rank in ranks])
            here = torch.tensor([received[ranks, rank][call] for rank in ranks])
            assert torch.equal(there, here.T)
    # Teams of other replicas do the same.
    assert len({tuple(owner for owner, _ in found[0]) for found in plans.values()}) == 1


def assert_covered_once(team: Any, unit: Any) -> None:
    """The processes that send to the owner hold each of the unit's elements once."""
    ends = [first + size for first, size in zip(unit.box.first, unit.box.shape, strict=True)]
    count = torch.zeros(ends, dtype=torch.int64)
    for at, part in enumerate(unit.parts):
        if unit.owner in unit.receivers(at) and not is_empty(part):
            part.of(count).add_(1)
    assert unit.box.of(count).eq(1).all()
    assert count.sum() == unit.box.of(count).numel()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rule": "lion"}, "needs no whole matrices"),
        ({"mesh": (2, 2)}, "a placement for each"),
        ({"placements": (R,)}, "shard nothing"),
        ({"mesh": (1,)}, "a single process"),
        ({"rank": 4}, "rank must be"),
        ({"shapes": []}, "at least one parameter"),
        ({"bucket_bytes": -1}, "bucket_bytes"),
    ],
)
def test_what_makes_no_plan_is_refused(given: dict[str, Any], message: str):
    request = {"shapes": MIXED, "mesh": (4,), "placements": (S,), **given}
    with pytest.raises(ValueError, match=message):
        plan_sharded(**request)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="no option 'colour'"):
        plan_sharded(MIXED, (4,), (S,), colour=1)
