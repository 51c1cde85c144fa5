"""The optimizer's own state dict on one mesh; copies; layouts as FSDP2 and tensor parallelism make them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import Parameter

import steepest

from .ranks import WORLD, placed, run_on_ranks
from .test_element_rules import assert_parts, in_one_process, make, wholes

CASES = ["adamw, stochastic", "simba, int8", "simba, stochastic"]


def sharded(mesh: Any, wholes: list[torch.Tensor]) -> list[Any]:
    return [Parameter(placed(whole, mesh, [Shard(0)])) for whole in wholes]


def train(mesh: Any, params: list[Any], optimizer: Any, steps: range) -> None:
    for step in steps:
        for param, grad in zip(params, wholes(step, params[0].dtype), strict=True):
            param.grad = placed(grad, mesh, [Shard(0)])
        optimizer.step()


@pytest.mark.parametrize("case", CASES)
def test_resuming_equals_never_stopping(case: str):
    expected = in_one_process(case, torch.bfloat16)

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        params = sharded(mesh, wholes(-1, torch.bfloat16))
        optimizer = make(case, params)
        train(mesh, params, optimizer, range(2))
        saved = optimizer.state_dict()
        again = make(case, params)
        again.load_state_dict(saved)
        mine, theirs = (
            each.state[params[0]][next(iter(again.state[params[0]]))] for each in (again, optimizer)
        )
        assert mine.to_local().data_ptr() != theirs.to_local().data_ptr()
        train(mesh, params, again, range(2, 3))
        assert_parts(params, again, *expected)

    run_on_ranks(work)


@pytest.mark.parametrize("case", CASES)
def test_whole_tensors_are_cut_where_they_are_loaded(case: str):
    whole = [Parameter(value) for value in wholes(-1, torch.bfloat16)]
    expected = make(case, whole)
    for step in range(2):
        for param, grad in zip(whole, wholes(step, torch.bfloat16), strict=True):
            param.grad = grad
        expected.step()
    saved, values = copy.deepcopy(expected.state_dict()), [param.detach().clone() for param in whole]
    for param, grad in zip(whole, wholes(2, torch.bfloat16), strict=True):
        param.grad = grad
    expected.step()

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        params = sharded(mesh, [value.clone() for value in values])
        optimizer = make(case, params)
        optimizer.load_state_dict(saved)
        train(mesh, params, optimizer, range(2, 3))
        assert_parts(params, optimizer, whole, expected)

    run_on_ranks(work)


def test_torchs_adamw_goes_on_here():
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        params, twins = (sharded(mesh, wholes(-1, torch.float64)) for _ in range(2))
        options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
        theirs, ours = torch.optim.AdamW(params, **options), steepest.AdamW(twins, **options)
        train(mesh, params, theirs, range(2))
        ours.load_state_dict(theirs.state_dict())
        for param, twin in zip(params, twins, strict=True):
            twin.data.copy_(param.data)
        train(mesh, params, theirs, range(2, 4))
        train(mesh, twins, ours, range(2, 4))
        for param, twin in zip(params, twins, strict=True):
            assert torch.allclose(param.detach().to_local(), twin.detach().to_local(), rtol=1e-12)

    run_on_ranks(work)


def test_state_of_another_layout_is_refused_by_name():
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        start = torch.ones(8, 4)
        optimizers = []
        for placement in (Shard(0), Shard(1), None):
            param = Parameter(start.clone() if placement is None else placed(start, mesh, [placement]))
            optimizers.append(steepest.Lion([("w", param)]))
            param.grad = torch.ones_like(param)
            optimizers[-1].step()
        saved = optimizers[0].state_dict()
        for other in optimizers[1:]:
            before = copy.deepcopy(other.state_dict()["state"])
            with pytest.raises(
                ValueError, match=r"'exp_avg' of parameter 'w' has .*S\(0\).*checkpoint reshards"
            ):
                other.load_state_dict(saved)
            after = other.state_dict()["state"]
            assert torch.equal(local(before[0]["exp_avg"]), local(after[0]["exp_avg"]))

    run_on_ranks(work)


def local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def test_a_parameter_that_is_laid_out_anew_after_a_step_is_refused():
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        old, new = (Parameter(placed(torch.ones(8, 4), mesh, [Shard(dim)])) for dim in (0, 1))
        optimizer = steepest.Lion([old])
        old.grad = torch.ones_like(old)
        optimizer.step()
        # As those do who replace parameters and keep their state.
        optimizer.param_groups[0]["params"][0] = new
        optimizer.state[new] = optimizer.state.pop(old)
        new.grad = torch.ones_like(new)
        with pytest.raises(ValueError, match="was resharded after a step"):
            optimizer.step()
        assert new.detach().to_local().eq(1).all()

    run_on_ranks(work)


def test_plain_parameters_may_be_replaced_by_shards_and_back():
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        plain = Parameter(torch.ones(8))
        optimizer = steepest.Lion([("w", plain)], lr=0.5, weight_decay=0.0, nonfinite="skip")
        shard = Parameter(placed(torch.ones(8), mesh, [Shard(0)]))
        for param in (shard, plain):
            optimizer.param_groups[0]["params"][0] = param
            param.grad = torch.ones_like(param)
            optimizer.step()
            assert local(param.detach()).eq(0.5).all()

    run_on_ranks(work)


def test_factors_are_loaded_for_shards_that_no_step_has_seen():
    """As where Accelerate puts them in place of the parameters that the optimizer was made with."""

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        grads = [torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

        def step(optimizer: Any, param: Any, grad: torch.Tensor) -> None:
            param.grad = placed(grad, mesh, [Shard(0)])
            optimizer.step()

        first = Parameter(placed(torch.eye(6, 4), mesh, [Shard(0)]))
        optimizer = steepest.SOAP([("w", first)])
        for grad in grads[:2]:
            step(optimizer, first, grad)
        other = steepest.SOAP([("w", Parameter(torch.eye(6, 4)))])
        second = Parameter(first.detach().clone())
        other.param_groups[0]["params"][0] = second
        other.load_state_dict(optimizer.state_dict())
        step(optimizer, first, grads[2])
        step(other, second, grads[2])
        assert torch.equal(first.to_local(), second.to_local())

    run_on_ranks(work)


def test_a_copy_steps_on_as_the_original():
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        model = torch.nn.ParameterList(sharded(mesh, wholes(-1, torch.float32)))
        optimizer = steepest.Lion(model.parameters())
        train(mesh, list(model), optimizer, range(1))
        twin, other = copy.deepcopy((model, optimizer))
        train(mesh, list(model), optimizer, range(1, 3))
        train(mesh, list(twin), other, range(1, 3))
        for one, two in zip(model, twin, strict=True):
            assert one is not two
            assert torch.equal(one.detach().to_local(), two.detach().to_local())

    run_on_ranks(work)


def test_fsdp_over_tensor_parallelism():
    """A norm that tensor parallelism leaves alone lies on FSDP's mesh, the rest on both."""

    original = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        model = copy.deepcopy(original)
        start = {name: param.detach().clone() for name, param in model.named_parameters()}
        parallelize_module(model[0], mesh["tp"], ColwiseParallel(output_layouts=Replicate()))
        parallelize_module(model[2], mesh["tp"], RowwiseParallel(input_layouts=Replicate()))
        fully_shard(model, mesh=mesh["dp"])
        params = dict(model.named_parameters())
        assert any(isinstance(each, _StridedShard) for each in params["0.weight"].placements)
        assert params["1.weight"].device_mesh != params["0.weight"].device_mesh
        options = {"lr": 0.5, "rounding": "stochastic", "nonfinite": "skip"}
        whole = {name: Parameter(value) for name, value in start.items()}
        optimizer = steepest.AdamW(params.items(), **options)
        expected = steepest.AdamW(whole.items(), **options)
        for step in range(2):
            for name, param in params.items():
                generator = torch.Generator().manual_seed(step)
                whole[name].grad = torch.randn(whole[name].shape, generator=generator)
                param.grad = placed(whole[name].grad, param.device_mesh, param.placements)
            optimizer.step()
            expected.step()
        assert_parts(list(params.values()), optimizer, list(whole.values()), expected)

    run_on_ranks(work)
