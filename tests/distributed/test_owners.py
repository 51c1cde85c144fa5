"""Who computes a matrix: plain tensors, gradients, several meshes and replicas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import Parameter

import steepest
from steepest.views import columns, interleaved, rows, transposed

from .matrix_runs import EXACT, SHAPES, alone, assert_equal, named, sharded, train, wholes
from .ranks import WORLD, placed, run_on_ranks

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
        saved = optimizer.state_dict()
        assert steepest_state(saved) == steepest_state(expected.state_dict())

    run_on_ranks(work)
    assert sum(computed) == 3 * len(SHAPES)  # not four times as many


def test_interleaved_matrices_are_computed_by_every_process_and_not_for_shards():
    """A block that is spread over its parameter is no box of it."""
    views = {"w0": interleaved(2, rows(1, 3)), "w2": transposed(interleaved(4, columns(1, 1)))}
    whole, _ = alone(lambda params: steepest.Muon(params, views=views, **EXACT))
    plain, _ = alone(lambda params: steepest.Muon(params, **EXACT))
    assert not torch.equal(whole[0], plain[0])

    def work(rank: int) -> None:
        params, _ = alone(lambda params: steepest.Muon(params, views=views, distributed="owners", **EXACT))
        assert_equal(params, whole)
        mesh = init_device_mesh("cpu", (WORLD,))
        shard = [("w0", Parameter(placed(torch.ones(8, 6), mesh, (Shard(0),))))]
        with pytest.raises(ValueError, match="parameter 'w0' is a DTensor: interleaved views are for whole"):
            steepest.Muon(shard, views={"w0": views["w0"]})

    run_on_ranks(work)


def steepest_state(saved: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {
        number: {name: value.tolist() for name, value in state.items()}
        for number, state in saved["state"].items()
    }


def test_one_process_ignores_the_option():
    whole, _ = alone(lambda params: steepest.Muon(params, **EXACT))
    params, _ = alone(lambda params: steepest.Muon(params, distributed="owners", **EXACT))
    assert_equal(params, whole)


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
