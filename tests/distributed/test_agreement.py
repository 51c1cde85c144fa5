"""All processes take a step, or none does: whatever is wrong with one of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import Parameter

import steepest
from steepest.distributed import agreement

from .ranks import LAYOUTS, WORLD, placed, run_on_ranks


def make(mesh: Any, placements: Any, **options: Any) -> tuple[list[Any], Any]:
    params = [Parameter(placed(torch.ones(8, 4), mesh, placements)) for _ in range(2)]
    params.append(Parameter(torch.ones(3)))  # a norm that tensor parallelism leaves alone
    for param in params:
        param.grad = torch.ones_like(param)
    named = zip(("a", "b", "norm"), params, strict=True)
    return params, steepest.Lion(list(named), lr=0.5, weight_decay=0.0, **options)


def attempt(optimizer: Any) -> str:
    try:
        optimizer.step()
    except (RuntimeError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "stepped"


def local(param: Any) -> torch.Tensor:
    return param.detach().to_local() if isinstance(param, DTensor) else param.detach()


def untouched(params: list[Any], optimizer: Any) -> bool:
    return all(local(param).eq(1).all() for param in params) and not any(optimizer.state.values())


@pytest.mark.parametrize("layout", ["FSDP", "HSDP", "FSDP x TP, columns", "replicated"])
def test_one_nan_makes_all_skip(layout: str):
    def work(rank: int) -> None:
        mesh_shape, placements = LAYOUTS[layout]
        params, optimizer = make(init_device_mesh("cpu", mesh_shape), placements, nonfinite="skip")
        if rank == 2:
            local(params[1].grad)[0, 0] = float("nan")
        optimizer.step()
        assert untouched(params, optimizer)
        assert optimizer.skipped_steps == 1
        params[1].grad = torch.ones_like(params[1])
        optimizer.step()
        assert all(local(param).eq(0.5).all() for param in params)
        assert optimizer.skipped_steps == 1

    run_on_ranks(work)


def test_one_infinite_element_makes_all_raise():
    def work(rank: int) -> str:
        mesh_shape, placements = LAYOUTS["FSDP x TP, rows"]
        params, optimizer = make(init_device_mesh("cpu", mesh_shape), placements, nonfinite="raise")
        if rank == 1:
            params[2].grad[0] = float("inf")
        said = attempt(optimizer)
        assert untouched(params, optimizer)
        return said

    said = run_on_ranks(work)
    assert "FloatingPointError: the gradient of parameter 'norm' has 1 infinite or NaN" in said[1]
    assert all("FloatingPointError: a gradient has" in said[rank] for rank in (0, 2, 3))


@pytest.mark.parametrize("missing", [["b"], ["a", "b", "norm"]], ids=["one", "all"])
def test_a_gradient_in_some_processes_only_raises_in_all(missing: list[str]):
    def work(rank: int) -> str:
        mesh_shape, placements = LAYOUTS["HSDP"]
        params, optimizer = make(init_device_mesh("cpu", mesh_shape), placements, nonfinite="skip")
        if rank == 3:
            for name in missing:
                params[["a", "b", "norm"].index(name)].grad = None
        said = attempt(optimizer)
        assert untouched(params, optimizer)
        return said

    more = " (and 2 more)" if len(missing) > 1 else ""
    text = f"parameter '{missing[0]}'{more} has a gradient on 3 of 4 processes; nothing was changed"
    assert run_on_ranks(work) == [f"RuntimeError: {text}"] * WORLD


def test_no_gradient_anywhere_is_no_error():
    def work(rank: int) -> None:
        params, optimizer = make(init_device_mesh("cpu", (4,)), [Shard(0)], nonfinite="skip")
        optimizer.zero_grad()
        optimizer.step()
        assert untouched(params, optimizer)

    run_on_ranks(work)


@pytest.mark.parametrize("change", [{"lr": 0.25}, {"weight_decay": 0.5}, {"betas": (0.5, 0.5)}], ids=str)
def test_other_options_in_one_process_raise_in_all(change: dict[str, Any]):
    def work(rank: int) -> str:
        params, optimizer = make(init_device_mesh("cpu", (4,)), [Shard(0)], nonfinite="raise")
        if rank == 1:
            optimizer.param_groups[0].update(change)
        said = attempt(optimizer)
        assert untouched(params, optimizer)
        return said

    said = run_on_ranks(work)
    assert (
        said == ["RuntimeError: the processes have different parameters or options; nothing was changed"] * 4
    )


def test_meshes_within_one_another_and_beside_one_another():
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        pairs = [(mesh, mesh["dp"]), (mesh["dp"], mesh["tp"]), (mesh["tp"], mesh["dp"])]
        for meshes in pairs:
            params = [
                Parameter(placed(torch.ones(4, 4), each, [Shard(0)] * each.ndim)) for each in meshes
            ]  # fmt: skip
            optimizer = steepest.Lion(params, nonfinite="skip")
            for param in params:
                param.grad = torch.ones_like(param)
            if rank == 3:
                local(params[1].grad)[0, 0] = float("nan")
            optimizer.step()
            assert untouched(params, optimizer)
            assert optimizer.skipped_steps == 1
            if rank == 2:
                params[0].grad = None
            said = attempt(optimizer)
            assert "has a gradient on 3 of 4 processes" in said, said

    run_on_ranks(work)


def test_a_sum_that_overflows_is_found_after_it_was_made():
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (4,))
        param = Parameter(placed(torch.ones(6), mesh, [Replicate()]))
        optimizer = steepest.SGD([param], nonfinite="skip")
        param.grad = DTensor.from_local(torch.full((6,), 3e38), mesh, [Partial()])
        optimizer.step()
        assert untouched([param], optimizer)
        assert optimizer.skipped_steps == 1

    run_on_ranks(work)


@pytest.mark.parametrize(("nonfinite", "sent"), [("ignore", 0), ("skip", 1), ("raise", 1)])
def test_what_is_sent(nonfinite: str, sent: int, monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    real = agreement._all_reduce
    monkeypatch.setattr(agreement, "_all_reduce", lambda *a: (calls.append(len(a[1])), real(*a))[1])

    def work(rank: int) -> None:
        _, optimizer = make(init_device_mesh("cpu", (4,)), [Shard(0)], nonfinite=nonfinite)
        for _ in range(2):
            optimizer.step()

    run_on_ranks(work)
    assert calls == [6] * (sent * 2 * WORLD)
