"""Ternary layers on several ranks, each of which keeps all accumulators, or those of its rows."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import steepest
from steepest.distributed.layout import region_at
from steepest.distributed.local import region_of
from steepest.ternary import BinaryLinear, TernaryLinear, flip_stats, pack, ternarize, top_k
from steepest.ternary.flipping import flip_layer
from steepest.ternary.rows import Rows, find_rows
from ternary.models import batch

from .ranks import WORLD, placed, run_on_ranks

STEPS = 4


def fresh_model(last: type[TernaryLinear] = TernaryLinear) -> nn.Sequential:
    """Rows that the ranks do not divide evenly, and fewer rows than ranks."""
    torch.manual_seed(0)
    return nn.Sequential(
        TernaryLinear(6, 13),
        nn.LayerNorm(13),
        nn.GELU(),
        TernaryLinear(13, 8),
        nn.GELU(),
        last(8, 2, bias=False),
    )


def loss_of(model: nn.Module, index: int) -> torch.Tensor:
    x, y = batch(index)
    return (model(x) - y).square().mean()


CASES: dict[str, dict[str, Any]] = {
    "sign": {"zero_pull": 0.1},
    "magnitude": {"votes": "magnitude", "threshold": 9, "outward": "drop"},
    "at most a fifth": {"max_flip_fraction": 0.2, "threshold": 2},
    "int16": {"votes": "magnitude", "threshold": 40, "accumulator": torch.int16, "max_flip_fraction": 0.1},
    "annealed": {"schedule": "annealed", "total_steps": 5},
}


def build(model: nn.Module, **options: Any) -> steepest.Optimizer:
    # With lr = 0, gradients that are not averaged do not matter.
    return steepest.build(model, "sgd", lr=0.0, ternary={"threshold": 3, **options})


def passes(model: nn.Module, step: int, rank: int, case: str) -> None:
    """A rank's backward passes of a step; of int16, more votes than a byte holds."""
    for micro in range(6 if case == "int16" else 1):
        loss_of(model, (step * WORLD + rank) * 6 + micro).backward()


def in_one_process(original: nn.Module, case: str, steps: int = STEPS) -> tuple[nn.Module, Any]:
    model = copy.deepcopy(original)
    optimizer = build(model, **CASES[case])
    for step in range(steps):
        if case == "int16":
            # The ranks' passes are numbered in turn.
            for micro in range(6):
                for rank in range(WORLD):
                    loss_of(model, (step * WORLD + rank) * 6 + micro).backward()
        else:
            for rank in range(WORLD):
                passes(model, step, rank, case)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def train(model: nn.Module, optimizer: Any, rank: int, case: str, steps: range) -> None:
    for step in steps:
        passes(model, step, rank, case)
        optimizer.step()
        optimizer.zero_grad()


def layers_of(model: nn.Module) -> dict[str, TernaryLinear]:
    return {name: each for name, each in model.named_modules() if isinstance(each, TernaryLinear)}


def assert_equal(model: nn.Module, optimizer: Any, expected: tuple[nn.Module, Any]) -> None:
    """T, this rank's accumulators, and the numbers that a user sees are those of one process."""
    for name, layer in layers_of(model).items():
        theirs = layers_of(expected[0])[name]
        assert torch.equal(layer.unpack(), theirs.unpack()), name  # which also looks at checksums
        mine, whole = (o.state[each.votes] for o, each in ((optimizer, layer), (expected[1], theirs)))
        a = mine["accumulator"]
        if isinstance(a, DTensor):
            assert a.shape == whole["accumulator"].shape
            assert torch.equal(a.to_local(), region_of(a).of(whole["accumulator"]))
        else:
            assert torch.equal(a, whole["accumulator"])
        assert mine["step"] == whole["step"]
    assert flip_stats(optimizer) == flip_stats(expected[1])


@pytest.mark.parametrize("distributed", [None, "rows"])
@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_one_process_that_votes_for_all(case: str, distributed: str | None):
    original = fresh_model(BinaryLinear if case == "magnitude" else TernaryLinear)
    expected = in_one_process(original, case)
    assert flip_stats(expected[1]).total_flips > 20

    def work(rank: int) -> int:
        model = copy.deepcopy(original)
        optimizer = build(model, **CASES[case], distributed=distributed)
        train(model, optimizer, rank, case, range(STEPS))
        assert_equal(model, optimizer, expected)
        why = optimizer.explain().rows[-1].why
        assert why.endswith("divided by rows") == (distributed == "rows")
        return optimizer.state_bytes()

    held = run_on_ranks(work)
    layers = layers_of(expected[0]).values()
    counters = sum(expected[1].state[layer.votes]["accumulator"].nbytes for layer in layers)
    rest = expected[1].state_bytes() - counters
    assert sum(held) == WORLD * rest + counters * (WORLD if distributed is None else 1)


@pytest.mark.parametrize("bits", [1, 2, 16])
@pytest.mark.parametrize("rows", [1, 3, 22])
def test_the_largest_counters_of_all_ranks_flip(rows: int, bits: int, monkeypatch: pytest.MonkeyPatch):
    """With few bits to break ties, the last choice is by all of the noise, over all ranks."""
    monkeypatch.setattr(top_k, "_TIE_BITS", bits)
    columns = 20
    generator = torch.Generator().manual_seed(rows)
    values = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
    counters = torch.randint(-5, 6, (rows, columns), generator=generator, dtype=torch.int8)
    votes = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
    options: dict[str, Any] = {"threshold": 2, "outward": "drop", "zero_pull": 0.3, "key": (1, 2)}
    for at_most in (0, 1, rows * columns // 3, rows * columns):
        packed, a = pack(values), counters.clone()
        flips = flip_layer(packed, a, votes.clone(), **options, at_most=at_most)

        def work(rank: int, at_most: int = at_most, packed=packed, a=a, flips=flips) -> None:
            part = find_rows(None, (rows, columns))
            assert part is not None
            mine, kept = pack(values), counters[part.own].clone()
            own = flip_layer(
                mine[part.own], kept, votes[part.own].clone(), **options, at_most=at_most, part=part
            )
            assert part.share(mine, own) == flips
            assert torch.equal(mine, packed)
            assert torch.equal(kept, a[part.own])

        run_on_ranks(work)


def test_noise_by_the_ranks_own_places_would_differ(monkeypatch: pytest.MonkeyPatch):
    """Negative control: what the tests above compare depends on the rows' places."""
    monkeypatch.setattr(Rows, "first", 0)
    original = fresh_model()
    expected = in_one_process(original, "sign")

    def work(rank: int) -> bool:
        model = copy.deepcopy(original)
        optimizer = build(model, **CASES["sign"], distributed="rows")
        train(model, optimizer, rank, "sign", range(STEPS))
        return torch.equal(model[0].packed, expected[0][0].packed)

    assert not any(run_on_ranks(work))


@pytest.mark.parametrize("count", [1, 40, 130])
@pytest.mark.parametrize("distributed", [None, "rows"])
def test_what_a_step_sends(distributed: str | None, count: int, monkeypatch: pytest.MonkeyPatch):
    """By rows: a byte a vote for the others' rows, a quarter a weight of the own rows, and a count."""
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    sent: list[tuple[int, str, int]] = []

    def watch(name: str, bytes_of: Any) -> None:
        call = getattr(dist, name)

        def watched(*given: Any, **more: Any) -> Any:
            sent.append((dist.get_rank(), name, bytes_of(*given)))
            return call(*given, **more)

        monkeypatch.setattr(dist, name, watched)

    watch("all_reduce", lambda tensor: tensor.nbytes)
    watch("all_to_all_single", lambda out, tensor, _, sizes: tensor.nbytes - sizes[dist.get_rank()])
    watch(gather, lambda out, tensor: tensor.nbytes)
    original = nn.Sequential(TernaryLinear(16, 10), TernaryLinear(10, 2))

    def work(rank: int) -> None:
        model = copy.deepcopy(original)
        optimizer = build(model, distributed=distributed)
        for _ in range(count):
            model(torch.ones(2, 16)).sum().backward()
        optimizer.step()

    run_on_ranks(work)
    # Once: what each rank has to say about each layer, five numbers.
    table = ("all_reduce", 8 * 5 * 2)
    # A byte holds 127 votes, those of all ranks or one's own; else the all-reduce sends int32.
    of_sum, of_own = {1: (1, 1), 40: (4, 1), 130: (4, 2)}[count]
    for rank, (high, low) in enumerate([(3, 1), (3, 1), (3, 0), (1, 0)]):
        calls = [call for who, *call in sent if who == rank]
        if distributed is None:
            expected = [table, ("all_reduce", of_sum * 10 * 16), ("all_reduce", of_sum * 2 * 10)]
        else:
            # All ranks send as many rows of T as one rank has at most.
            votes = [("all_to_all_single", of_own * n) for n in ((10 - high) * 16, (2 - low) * 10)]
            rows = [(gather, n + 8) for n in (3 * 4, 1 * 3)]
            expected = [table, votes[0], rows[0], votes[1], rows[1]]
        assert calls == [list(call) for call in expected]


@pytest.mark.parametrize("fault", ["skip", "raise"])
@pytest.mark.parametrize("distributed", [None, "rows"])
def test_one_infinite_gradient_stops_all_ranks(distributed: str | None, fault: str):
    original = fresh_model()

    def work(rank: int) -> str:
        model = copy.deepcopy(original)
        optimizer = steepest.build(
            model, "sgd", lr=0.0, nonfinite=fault, ternary={"threshold": 1, "distributed": distributed}
        )
        before = {name: layer.packed.clone() for name, layer in layers_of(model).items()}
        passes(model, 0, rank, "sign")
        said = "stepped"
        if rank == 2:
            model[0].bias.grad[0] = float("inf")
        try:
            optimizer.step()
        except FloatingPointError as error:
            said = str(error)
        assert all(torch.equal(layer.packed, before[name]) for name, layer in layers_of(model).items())
        optimizer.zero_grad()
        passes(model, 1, rank, "sign")
        optimizer.step()
        assert flip_stats(optimizer).flips > 0
        assert flip_stats(optimizer).step == 1
        return said

    said = run_on_ranks(work)
    assert [text == "stepped" for text in said] == [True, True, fault == "skip", True]


def test_copies_and_state_dicts_go_on():
    original = fresh_model()
    expected = in_one_process(original, "at most a fifth")
    halfway = in_one_process(original, "at most a fifth", 2)
    saved = copy.deepcopy(halfway[1].state_dict())

    def work(rank: int) -> None:
        model = copy.deepcopy(original)
        optimizer = build(model, **CASES["at most a fifth"], distributed="rows")
        train(model, optimizer, rank, "at most a fifth", range(2))
        for way in ("copy", "own", "whole"):
            if way == "copy":
                twin, other = copy.deepcopy((model, optimizer))
            else:
                twin = copy.deepcopy(model)
                other = build(twin, **CASES["at most a fifth"], distributed="rows")
                other.load_state_dict(optimizer.state_dict() if way == "own" else saved)
            assert other.param_groups[-1]["distributed"] == "rows"
            train(twin, other, rank, "at most a fifth", range(2, STEPS))
            if way == "copy":
                assert_equal(twin, other, expected)
                continue
            for at in (0, 3, 5):
                assert torch.equal(twin[at].packed, expected[0][at].packed)
                a = other.state[twin[at].votes]["accumulator"]
                whole = expected[1].state[expected[0][at].votes]["accumulator"]
                assert torch.equal(a.to_local(), region_of(a).of(whole))

    run_on_ranks(work)


def test_other_divisions_are_refused_by_name():
    with pytest.raises(ValueError, match=r"distributed must be one of None, 'rows', got 'columns'"):
        build(fresh_model(), distributed="columns")


def test_what_cannot_change_after_the_first_step_is_refused():
    original = fresh_model()

    def work(rank: int) -> None:
        model = copy.deepcopy(original)
        optimizer = build(model, distributed="rows")
        train(model, optimizer, rank, "sign", range(1))
        before = model[0].packed.clone()
        saved = optimizer.state_dict()
        passes(model, 1, rank, "sign")
        optimizer.param_groups[-1]["distributed"] = None
        with pytest.raises(ValueError, match=r"distributed, .* was different .*'0'.*nothing was"):
            optimizer.step()
        assert torch.equal(model[0].packed, before)
        whole = build(model)
        with pytest.raises(ValueError, match=r"'0' is divided .*torch\.distributed\.checkpoint; nothing was"):
            whole.load_state_dict(saved)
        assert not any(whole.state.values())

    run_on_ranks(work)


def test_the_ranks_that_vote_are_those_of_the_layers_mesh():
    original = fresh_model()

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

        def made(*placements: tuple[Any, Any]) -> nn.Module:
            model = copy.deepcopy(original)
            for name, (on, cut) in zip("035", placements, strict=False):
                layer = model[int(name)]
                layer.votes = nn.Parameter(placed(torch.zeros(1), on, cut))
            return model

        rows = [Shard(0)]
        optimizer = build(made(*[(mesh["dp"], rows)] * 3))
        assert optimizer.targets.process_group is mesh["dp"].get_group()
        both = (mesh, [Replicate(), Shard(0)])
        assert build(made(both, both)).targets.process_group is None
        with pytest.raises(ValueError, match="'0' and '3' lie on different processes: pass process_group"):
            build(made((mesh["dp"], rows)))
        group = mesh["dp"].get_group()
        assert build(made((mesh["dp"], rows)), process_group=group).targets.process_group is group

    run_on_ranks(work)


def test_ranks_with_different_weights_are_told_so_before_the_first_step():
    originals = [fresh_model() for _ in range(WORLD)]
    # fully_shard takes each process's buffers as they are.
    originals[1][3].set_ternary(-originals[1][3].unpack())

    def work(rank: int) -> None:
        model = originals[rank]
        before = model[0].packed.clone()
        optimizer = build(model)
        passes(model, 0, rank, "sign")
        with pytest.raises(RuntimeError, match=r"different weights T in ternary layer '3'; nothing was"):
            optimizer.step()
        assert torch.equal(model[0].packed, before)

    run_on_ranks(work)


@pytest.mark.parametrize(
    ("option", "value"), [("distributed", "rows"), ("votes", "magnitude"), ("seed", 1), ("threshold", 4.0)]
)
def test_ranks_with_different_options_all_raise(option: str, value: Any):
    original = fresh_model()

    def work(rank: int) -> None:
        model = copy.deepcopy(original)
        optimizer = build(model)
        if rank == 3:
            optimizer.param_groups[-1][option] = value
        before = model[0].packed.clone()
        passes(model, 0, rank, "sign")
        with pytest.raises(
            RuntimeError, match="different options for ternary layer '0'; nothing was changed"
        ):
            optimizer.step()
        assert torch.equal(model[0].packed, before)

    run_on_ranks(work)


def test_rows_are_cut_as_dtensors_are():
    for rows in range(1, 18):
        for world_size in range(1, 7):
            held = [Rows(None, rank, world_size, rows, 3).own for rank in range(world_size)]
            assert [row for own in held for row in range(own.start, own.stop)] == list(range(rows))
            for rank, own in enumerate(held):
                region = region_at((rows, 3), (world_size,), (Shard(0),), (rank,))
                assert region.shape[0] == own.stop - own.start
                assert region.first[0] == own.start or own.start == own.stop


def test_layers_are_drawn_anew_where_they_are_sharded():
    """As after fully_shard on the meta device and to_empty()."""
    original = fresh_model()[3]
    draw = threading.Lock()
    torch.manual_seed(1)
    expected = copy.deepcopy(original)
    expected.reset_parameters()

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        layer = copy.deepcopy(original)
        for name in ("scale", "bias", "votes"):
            blank = torch.full_like(getattr(layer, name), 7.0).detach()
            setattr(layer, name, nn.Parameter(placed(blank, mesh, [Shard(0)])))
        layer.packed.fill_(0)
        # Threads share a generator.
        with draw, torch.random.fork_rng():
            torch.manual_seed(1)
            layer.reset_parameters()
        assert torch.equal(layer.packed, expected.packed)
        for name in ("scale", "bias", "votes"):
            own = getattr(layer, name).detach()
            assert torch.equal(own.to_local(), region_of(own).of(getattr(expected, name).detach()))

    run_on_ranks(work)


def test_sharded_layers_are_not_converted():
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        for layer in (model[0], model[2]):
            layer.weight = nn.Parameter(placed(layer.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match=r"0: its weight is sharded: call ternarize\(\) before"):
            ternarize(model)
        with pytest.raises(ValueError, match="the weight is a DTensor: make ternary layers before"):
            TernaryLinear.from_linear(model[0])

    run_on_ranks(work)


@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
def test_tensor_parallelism_is_refused_by_name(style: Any):
    original = fresh_model()

    def work(rank: int) -> None:
        model = copy.deepcopy(original)
        mesh = init_device_mesh("cpu", (WORLD,))
        with pytest.raises(NotImplementedError, match=r"only supports? nn\.Linear"):
            parallelize_module(model, mesh, {"0": style()})

    run_on_ranks(work)
