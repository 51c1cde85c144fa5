"""What travels between processes for a matrix, and what does not."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.nn import Parameter

import steepest
from steepest import views
from steepest.distributed import exchange
from steepest.rules.muon import MuonRule

from .matrix_runs import EXACT, alone, assert_equal, named, sharded, train, wholes
from .ranks import LAYOUTS, WORLD, placed, run_on_ranks

# -- what travels


class Sent:
    """The bytes that each rank sends to others, and the calls, counted where they are sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: dict[int, list[int]] = {rank: [] for rank in range(WORLD)}
        real, lock = exchange.send, threading.Lock()

        def counting(group: Any, sent: Any, received: Any) -> Any:
            if group is not None:
                own = dist.get_group_rank(group, dist.get_rank())
                with lock:
                    self.calls[dist.get_rank()].append(sum(sent.splits) - sent.splits[own])
            return real(group, sent, received)

        monkeypatch.setattr("steepest.engine.waves.send", counting)


@pytest.mark.parametrize(("exchange_dtype", "width"), [(None, 4), (torch.bfloat16, 2)])
def test_bytes_are_those_of_the_formula(exchange_dtype: Any, width: int, monkeypatch: pytest.MonkeyPatch):
    """2·N·e/S a rank on average, before what stays where it is, and a flag of eight bytes to each rank."""
    sent = Sent(monkeypatch)
    shapes = [(8, 4)] * 8

    def work(rank: int) -> None:
        sharded(
            lambda params: steepest.Muon(params, exchange_dtype=exchange_dtype, **EXACT),
            "FSDP",
            steps=1,
            shapes=shapes,
        )

    run_on_ranks(work)
    elements = sum(m * n for m, n in shapes)
    there = elements * width // WORLD * (WORLD - 1) // WORLD
    for calls in sent.calls.values():
        assert calls == [there, there + 8 * (WORLD - 1)]


def test_more_waves_send_the_same_bytes_and_hold_less(monkeypatch: pytest.MonkeyPatch):
    sent = Sent(monkeypatch)
    shapes = [(8, 4)] * 8
    run_on_ranks(
        lambda rank: sharded(
            lambda params: steepest.Muon(params, bucket_bytes=1, **EXACT), "FSDP", steps=1, shapes=shapes
        )
    )
    for calls in sent.calls.values():
        assert len(calls) == 4  # two waves of a matrix for each owner
        assert sum(calls) == 2 * 8 * 32 * 4 // WORLD * (WORLD - 1) // WORLD + 2 * 8 * (WORLD - 1)


def test_what_has_arrived_is_freed_before_matrices_are_computed(monkeypatch: pytest.MonkeyPatch):
    arrived: dict[int, list[Any]] = {rank: [] for rank in range(WORLD)}
    alive: list[bool] = []
    unpack, transform = exchange.Parcels.unpack, MuonRule.transform

    def noted(self: Any) -> None:
        arrived[dist.get_rank()] = [weakref.ref(piece) for each in self.tensors for piece in each]
        unpack(self)

    def looked(self: Any, u: torch.Tensor, **given: Any) -> Any:
        alive.append(any(piece() is not None for piece in arrived[dist.get_rank()]))
        return transform(self, u, **given)

    monkeypatch.setattr(exchange.Parcels, "unpack", noted)
    monkeypatch.setattr(MuonRule, "transform", looked)
    run_on_ranks(
        lambda rank: sharded(
            lambda params: steepest.Muon(params, **EXACT), "FSDP", steps=1, shapes=[(8, 4)] * 8
        )
    )
    assert alive == [False] * WORLD


def test_matrices_that_lie_whole_on_one_process_do_not_travel(monkeypatch: pytest.MonkeyPatch):
    """A stack of experts cut between them, heads whose rows lie together, and whole matrices."""
    sent = Sent(monkeypatch)
    shapes = [(8, 4, 3), (16, 4)]

    def make(params: Any) -> Any:
        return steepest.Muon(
            [
                {"params": params[:1], "view": "batch"},
                {"params": params[1:], "views": {"w1": views.heads(8, 2)}},
            ],
            **EXACT,
        )

    whole, _ = alone(make, shapes=shapes)
    run_on_ranks(lambda rank: assert_equal(sharded(make, "FSDP", shapes=shapes)[0], whole))
    run_on_ranks(lambda rank: assert_equal(sharded(make, "replicated", shapes=shapes)[0], whole))
    assert all(calls == [] for calls in sent.calls.values())


def test_heads_that_are_cut_travel():
    def make(params: Any) -> Any:
        return steepest.Muon(
            params, views={"w0": views.rows(3, 5, 4), "w1": views.transposed(views.columns(2, 4))}, **EXACT
        )

    shapes = [(12, 5), (7, 6)]
    for layout in LAYOUTS:
        whole, _ = alone(make, shapes=shapes)
        run_on_ranks(
            lambda rank, layout=layout, whole=whole: assert_equal(
                sharded(make, layout, shapes=shapes)[0], whole
            )
        )


def test_narrow_exchange_rounds_what_travels():
    whole, _ = alone(lambda params: steepest.Muon(params, **EXACT), steps=1)
    start = wholes(-1)

    def work(rank: int) -> None:
        params, _ = sharded(
            lambda params: steepest.Muon(params, exchange_dtype=torch.bfloat16, **EXACT), "HSDP", steps=1
        )
        for own, theirs, before in zip(params, whole, start, strict=True):
            moved = (theirs.detach() - before).abs().max()
            part = placed(theirs.detach(), own.device_mesh, own.placements).to_local()
            error = (own.detach().to_local() - part).abs()
            assert error.numel() == 0 or error.max() < 0.05 * moved

    run_on_ranks(work)


def test_replicated_dtensors_are_computed_everywhere_unless_owners_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
):
    sent = Sent(monkeypatch)
    whole, _ = alone(lambda params: steepest.Muon(params, **EXACT))
    run_on_ranks(
        lambda rank: assert_equal(
            sharded(lambda params: steepest.Muon(params, **EXACT), "replicated")[0], whole
        )
    )
    assert all(calls == [] for calls in sent.calls.values())
    run_on_ranks(
        lambda rank: assert_equal(
            sharded(lambda params: steepest.Muon(params, distributed="owners", **EXACT), "replicated")[0],
            whole,
        )
    )
    assert all(len(calls) == 3 for calls in sent.calls.values())  # the first leg is free


def test_a_mesh_of_one_process_needs_no_exchange(monkeypatch: pytest.MonkeyPatch):
    sent = Sent(monkeypatch)
    whole, _ = alone(lambda params: steepest.QUAD(params, lr=0.1))

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (1,))
        params = [Parameter(placed(each, mesh, [Shard(0)])) for each in wholes(-1)]
        optimizer = steepest.QUAD(named(params), lr=0.1)
        train(optimizer, params, 3, lambda step: [placed(g, mesh, [Shard(0)]) for g in wholes(step)])
        assert_equal(params, whole)
        optimizer.load_state_dict(optimizer.state_dict())

    run_on_ranks(work, 1)
    assert all(calls == [] for calls in sent.calls.values())
