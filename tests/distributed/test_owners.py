"""Who computes a matrix, what travels for it, and what happens if that fails."""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import Parameter

import steepest
from steepest import views
from steepest.distributed import exchange
from steepest.rules.muon import MuonRule

from .ranks import LAYOUTS, WORLD, placed, run_on_ranks

SHAPES = [(8, 6), (7, 5), (12, 8), (3, 4), (8, 6), (16, 4), (4, 4), (6, 9)]
EXACT = {"method": "svd", "lr": 0.05, "weight_decay": 0.1}


def wholes(step: int, shapes: Any = SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def named(params: list[Any]) -> list[tuple[str, Any]]:
    return [(f"w{at}", param) for at, param in enumerate(params)]


def train(optimizer: Any, params: list[Any], steps: int, grad_of: Any) -> None:
    for step in range(steps):
        for at, param in enumerate(params):
            param.grad = grad_of(step)[at]
        optimizer.step()


def alone(make: Any, steps: int = 3, shapes: Any = SHAPES) -> tuple[list[Any], Any]:
    params = [Parameter(whole) for whole in wholes(-1, shapes)]
    optimizer = make(named(params))
    train(optimizer, params, steps, lambda step: wholes(step, shapes))
    return params, optimizer


def sharded(make: Any, layout: str, steps: int = 3, shapes: Any = SHAPES) -> tuple[list[Any], Any]:
    mesh_shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", mesh_shape)

    def cut(step: int) -> list[Any]:
        return [placed(whole, mesh, placements) for whole in wholes(step, shapes)]

    params = [Parameter(each) for each in cut(-1)]
    optimizer = make(named(params))
    train(optimizer, params, steps, cut)
    return params, optimizer


def assert_equal(params: list[Any], whole: list[Any]) -> None:
    for own, theirs in zip(params, whole, strict=True):
        part = theirs.detach()
        if isinstance(own, DTensor):
            part = placed(part, own.device_mesh, own.placements).to_local()
            own = own.to_local()
        assert torch.equal(own.detach(), part)


# -- plain parameters, as under DistributedDataParallel


@pytest.mark.parametrize("rule", ["muon", "normuon", "quad", "soap"])
def test_processes_with_whole_tensors_share_the_work(rule: str, monkeypatch: pytest.MonkeyPatch):
    options = EXACT if "muon" in rule else {"lr": 0.05}
    computed: list[int] = []
    cls = type(steepest.create(rule, [Parameter(torch.ones(2, 2))]).rule)
    real = cls.transform
    monkeypatch.setattr(
        cls, "transform", lambda self, u, *a, **k: (computed.append(len(u)), real(self, u, *a, **k))[1]
    )
    whole, expected = alone(lambda params: steepest.create(rule, params, **options))
    computed.clear()

    def work(rank: int) -> None:
        params, optimizer = alone(
            lambda params: steepest.create(rule, params, distributed="owners", **options)
        )
        assert_equal(params, whole)
        for param, theirs in zip(params, whole, strict=True):
            assert torch.equal(
                *(o.state[p][name] for o, p in ((optimizer, param), (expected, theirs)))
                if (name := next(iter(expected.state[theirs]))) in optimizer.state[param]
                else (torch.ones(1),) * 2
            )
        saved = optimizer.state_dict()
        assert steepest_state(saved) == steepest_state(expected.state_dict())

    run_on_ranks(work)
    assert sum(computed) == 3 * len(SHAPES)  # not four times as many


def steepest_state(saved: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {
        number: {name: value.tolist() for name, value in state.items()}
        for number, state in saved["state"].items()
    }


def test_one_process_ignores_the_option():
    whole, _ = alone(lambda params: steepest.Muon(params, **EXACT))
    params, _ = alone(lambda params: steepest.Muon(params, distributed="owners", **EXACT))
    assert_equal(params, whole)


# -- a user's own matrix function


class Own(steepest.OrthogonalizedOptimizer):
    """Signs, from the whole matrix; decays by its own code."""

    fails_on: int | None = None
    seen: list[tuple[Any, Any]]

    def orthogonalize(self, p: Any, grad: torch.Tensor, **options: Any) -> torch.Tensor:
        if self.fails_on == dist.get_rank() if dist.is_initialized() else False:
            raise ArithmeticError("no")
        assert grad.shape == p.shape
        return grad.sign() * grad.abs().max()


class OwnDecay(Own):
    def _apply_weight_decay_inplace(self, p: Any, grad: Any, lr: Any, weight_decay: float) -> None:
        p.mul_(1 - lr * weight_decay)


@pytest.mark.parametrize("cls", [Own, OwnDecay])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_user_s_function_sees_the_whole_matrix(layout: str, cls: Any):
    def make(params: Any) -> Any:
        return cls(params, lr=0.1, weight_decay=0.5, use_nesterov=True)

    whole, _ = alone(make)
    run_on_ranks(lambda rank: assert_equal(sharded(make, layout)[0], whole))


@pytest.mark.parametrize("cls", [Own, OwnDecay])
@pytest.mark.parametrize("bad", [0, 3])
def test_if_a_user_s_function_raises_on_one_process_nothing_changes_on_any(bad: int, cls: Any):
    def work(rank: int) -> str:
        params, optimizer = sharded(lambda params: cls(params, lr=0.1, bucket_bytes=2000), "FSDP", steps=1)
        optimizer.fails_on = bad
        before = [
            each.to_local().clone()
            for param in params
            for each in (param.detach(), optimizer.state[param]["momentum_buffer"])
        ]
        with pytest.raises((ArithmeticError, RuntimeError)) as raised:
            optimizer.step()
        after = [
            each.to_local()
            for param in params
            for each in (param.detach(), optimizer.state[param]["momentum_buffer"])
        ]
        assert all(map(torch.equal, before, after))
        optimizer.fails_on = None
        optimizer.step()  # nobody waits for anybody
        return f"{type(raised.value).__name__}: {raised.value}"

    said = run_on_ranks(work)
    assert said[bad] == "ArithmeticError: no"
    for rank in set(range(WORLD)) - {bad}:
        assert f"RuntimeError: rank {bad} failed to compute the direction of parameter 'w" in said[rank]
        assert said[rank].endswith("nothing was changed")


def test_if_a_rule_fails_on_one_process_all_raise(monkeypatch: pytest.MonkeyPatch):
    real = MuonRule.transform

    def failing(self: Any, u: torch.Tensor, **given: Any) -> Any:
        if dist.is_initialized() and dist.get_rank() == 1:
            raise MemoryError("none left")
        return real(self, u, **given)

    monkeypatch.setattr(MuonRule, "transform", failing)

    def work(rank: int) -> str:
        with pytest.raises((MemoryError, RuntimeError)) as raised:
            sharded(lambda params: steepest.Muon(params, **EXACT), "HSDP", steps=1)
        return f"{type(raised.value).__name__}: {raised.value}"

    said = run_on_ranks(work)
    assert said[1] == "MemoryError: none left"
    for rank in (0, 2, 3):
        assert "RuntimeError: rank 1 failed to compute the direction of parameter 'w" in said[rank]


@pytest.fixture
def poisoned() -> Any:
    """Let memory that nobody has written hold NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_what_fails_where_nothing_travels_is_left_as_it_was(poisoned: None, monkeypatch: pytest.MonkeyPatch):
    real = MuonRule.transform

    def failing(self: Any, u: torch.Tensor, **given: Any) -> Any:
        if dist.is_initialized() and dist.get_rank() == 1:
            raise MemoryError("none left")
        return real(self, u, **given)

    monkeypatch.setattr(MuonRule, "transform", failing)

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        (whole,) = wholes(-1, [(8, 4, 3)])
        param = Parameter(placed(whole, mesh, [Shard(0)]))
        param.grad = torch.ones_like(param)
        before = param.to_local().clone()
        optimizer = steepest.Muon([param], view="batch", **EXACT)
        if rank == 1:
            with pytest.raises(MemoryError):
                optimizer.step()
        else:
            optimizer.step()
        assert torch.equal(param.to_local(), before) == (rank == 1)

    run_on_ranks(work)


def test_a_user_s_function_that_fails_where_nothing_travels_is_an_error_on_all():
    def work(rank: int) -> str:
        params, optimizer = sharded(lambda params: Own(params, lr=0.1), "FSDP", steps=1, shapes=[(1, 6)])
        before = params[0].to_local().clone()
        optimizer.fails_on = 0  # the only process that holds any of the matrix
        with pytest.raises((ArithmeticError, RuntimeError)) as raised:
            optimizer.step()
        assert torch.equal(params[0].to_local(), before)
        return f"{type(raised.value).__name__}: {raised.value}"

    said = run_on_ranks(work)
    assert said[0] == "ArithmeticError: no"
    for each in said[1:]:
        assert each.startswith("RuntimeError: rank 0 failed to compute the direction of parameter 'w0'")


def test_a_user_s_function_that_fails_in_one_replica_is_an_error_in_all():
    def work(rank: int) -> str:
        # One matrix: each of two replicas computes it by itself.
        params, optimizer = sharded(lambda params: Own(params, lr=0.1), "HSDP", steps=1, shapes=[(8, 6)])
        before = params[0].to_local().clone()
        optimizer.fails_on = 0
        with pytest.raises((ArithmeticError, RuntimeError)) as raised:
            optimizer.step()
        assert torch.equal(params[0].to_local(), before)
        return f"{type(raised.value).__name__}: {raised.value}"

    said = run_on_ranks(work)
    assert said[0] == "ArithmeticError: no"
    assert "rank 0 failed to compute the direction of parameter 'w0'" in said[1]
    assert all(each.startswith("RuntimeError: a process of other replicas failed") for each in said[2:])


def test_the_state_of_a_matrix_without_elements_is_as_in_one_process(poisoned: None):
    shapes = [(5, 0), (8, 6)]

    def make(params: Any) -> Any:
        return steepest.NorMuon(params, **EXACT)

    whole, other = alone(make, shapes=shapes)

    def work(rank: int) -> None:
        params, optimizer = sharded(make, "FSDP", shapes=shapes)
        assert_equal(params, whole)
        for own, theirs in zip(params, whole, strict=True):
            name = "second_momentum"
            assert torch.equal(optimizer.state[own][name], other.state[theirs][name])

    run_on_ranks(work)


# -- gradients


def test_a_gradient_that_one_process_lacks_is_an_error_on_all():
    def work(rank: int) -> str:
        params, optimizer = sharded(lambda params: steepest.Muon(params, **EXACT), "FSDP", steps=1)
        before = [param.to_local().clone() for param in params]
        if rank == 2:
            params[1].grad = None
        with pytest.raises(RuntimeError) as raised:
            optimizer.step()
        assert all(torch.equal(a, b.to_local()) for a, b in zip(before, params, strict=True))
        return str(raised.value)

    text = "parameter 'w1' has a gradient on 3 of 4 processes; nothing was changed"
    assert run_on_ranks(work) == [text] * WORLD


def test_parameters_without_gradients_are_left_alone_and_keep_their_owners():
    def work(rank: int) -> None:
        params, optimizer = sharded(lambda params: steepest.QUAD(params, lr=0.05), "FSDP", steps=1)
        owners = owners_of(optimizer, params)
        before = params[2].to_local().clone()
        params[2].grad = None
        optimizer.step()
        assert torch.equal(params[2].to_local(), before)
        extra = Parameter(placed(torch.ones(30, 30), params[0].device_mesh, [Shard(0)]))
        extra.grad = torch.ones_like(extra)
        optimizer.add_param_group({"params": [("extra", extra)]})
        optimizer.step()
        assert owners_of(optimizer, params) == owners
        assert len(set(owners)) == WORLD

    run_on_ranks(work)


def owners_of(optimizer: Any, params: list[Any]) -> list[int]:
    sharding = optimizer._collector.sharding(optimizer.param_groups, optimizer._user_functions)
    return [unit.owner for param in params for unit in sharding.of(param)]


@pytest.mark.parametrize("how", ["option", "copy"])
def test_factors_that_lie_on_another_process_are_an_error_on_all(how: str):
    def work(rank: int) -> str:
        # Fewer matrices than processes, so that some lack nothing.
        params, optimizer = sharded(lambda params: steepest.SOAP(params), "FSDP", steps=1, shapes=[(6, 4)])
        if how == "option":
            optimizer.param_groups[0]["distributed"] = "everywhere"
        else:
            extra = Parameter(placed(torch.ones(30, 30), params[0].device_mesh, [Shard(0)]))
            extra.grad = torch.ones_like(extra)
            optimizer.add_param_group({"params": [("extra", extra)]})
            optimizer.step()
            # The matrices of a copy are given out at once, the largest first.
            optimizer = copy.deepcopy(optimizer)
            params = [param for group in optimizer.param_groups for param in group["params"]]
            for param in params:
                param.grad = torch.ones_like(param)
        before = [param.to_local().clone() for param in params]
        with pytest.raises((ValueError, RuntimeError)) as raised:
            optimizer.step()
        assert all(torch.equal(a, b.to_local()) for a, b in zip(before, params, strict=True))
        return str(raised.value)

    said = run_on_ranks(work)
    assert any("lies on another process" in each for each in said)
    other = "another process cannot take this step, and its error says why; nothing was changed"
    assert other in said
    assert all(each == other or "load a checkpoint" in each for each in said)


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_nan_in_one_shard_stops_all(nonfinite: str):
    def work(rank: int) -> None:
        params, optimizer = sharded(
            lambda params: steepest.Muon(params, nonfinite=nonfinite, **EXACT), "FSDP", steps=1
        )
        before = [param.to_local().clone() for param in params]
        if rank == 3:
            params[0].grad.to_local()[0, 0] = float("nan")
        if nonfinite == "raise":
            with pytest.raises(FloatingPointError):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.skipped_steps == 1
        assert all(torch.equal(a, b.to_local()) for a, b in zip(before, params, strict=True))

    run_on_ranks(work)


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


def test_gradients_laid_out_otherwise_are_redistributed_before_they_travel():
    whole, _ = alone(lambda params: steepest.Muon(params, **EXACT), steps=1)

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        params = [Parameter(placed(each, mesh, [Shard(0)])) for each in wholes(-1)]
        optimizer = steepest.Muon(named(params), **EXACT)
        for at, (param, grad) in enumerate(zip(params, wholes(0), strict=True)):
            # Quarters of it add up exactly.
            parts = [grad, Replicate()] if at % 2 else [grad / WORLD, Partial()]
            param.grad = DTensor.from_local(parts[0], mesh, [parts[1]])
        optimizer.step()
        assert_equal(params, whole)

    run_on_ranks(work)


def test_shared_and_plain_matrices_and_vectors_in_one_optimizer():
    """Sharded and whole matrices, and a norm of an element rule, as tensor parallelism leaves them."""

    def make(params: Any) -> Any:
        return steepest.Muon(
            [{"params": params[:6]}, {"params": params[6:], "rule": "adamw", "lr": 0.1}],
            **EXACT,
            nonfinite="skip",
        )

    whole, _ = alone(make)

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        meshes = [(mesh, [Shard(0), Shard(1)]), (mesh["dp"], [Shard(0)]), (mesh["tp"], [Shard(1)]), None]

        def lay(step: int) -> list[Any]:
            each = [(value, meshes[at % 4]) for at, value in enumerate(wholes(step))]
            return [value if where is None else placed(value, *where) for value, where in each]

        params = [Parameter(each) for each in lay(-1)]
        optimizer = make(named(params))
        train(optimizer, params, 3, lay)
        assert_equal(params, whole)

    run_on_ranks(work)


@pytest.mark.parametrize("rule", ["quad", "soap"])
def test_replicas_without_a_matrix_for_each_process_compute_it_each(rule: str):
    """One matrix on two replicas of two shards: each replica has an owner, and a factor of its own."""

    def make(params: Any) -> Any:
        return steepest.create(rule, params, lr=0.05)

    shapes = [(8, 6)]
    whole, expected = alone(make, shapes=shapes)

    def work(rank: int) -> list[int]:
        params, optimizer = sharded(make, "HSDP", shapes=shapes)
        assert_equal(params, whole)
        saved = optimizer.state_dict()
        again = Parameter(params[0].detach().clone())
        other = make([("w0", again)])
        other.load_state_dict(saved)
        again.grad = params[0].grad
        for each in (optimizer, other):
            each.step()
        assert torch.equal(again.to_local(), params[0].to_local())
        held = sum(entry.numel() for entry in optimizer.state[params[0]].values() if entry.dim() > 1)
        return [held, sum(entry.numel() for entry in saved["state"][0].values() if entry.dim() > 1)]

    counts = run_on_ranks(work)
    total = sum(entry.numel() for entry in expected.state[whole[0]].values() if entry.dim() > 1)
    assert {count[1] for count in counts} == {total}
    assert sum(count[0] > 48 for count in counts) == 2
