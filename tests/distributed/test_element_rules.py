"""Element rules on DTensors equal one process that has the whole tensors, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.nn import Parameter

import steepest
from steepest.distributed.local import region_of

from .ranks import LAYOUTS, WORLD, alone_as, placed, run_on_ranks

# Even, uneven and empty shards; a vector, a number, a tensor of three dimensions.
SHAPES = [(8, 6), (7, 5), (3, 2), (9,), (), (4, 3, 5)]
STEPS = 3
PER_TENSOR = ("step", "gsnr", "measured")
STOCHASTIC = {"rounding": "stochastic", "seed": 3}
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "sign_gsd": ("signgsd", {"weight_decay_method": "cautious"}),
    "signum": ("signum", {}),
    "lion": ("lion", {"weight_decay_method": "l2"}),
    "lion, wide state": ("lion", {"state_dtype": torch.float64}),
    "adamw": ("adamw", {}),
    "ademamix": ("ademamix", {}),
    "sgd": ("sgd", {"momentum": 0.9, "maximize": True}),
    "simba": ("simba", {}),
    "simba, int8": ("simba", {"counter_dtype": torch.int8, "window_size": 20, "nonfinite": "skip"}),
    "simba, momentum": ("simba", {"memory": "momentum", "choice": "lion"}),
    "lion, stochastic": ("lion", STOCHASTIC),
    "adamw, stochastic": ("adamw", {**STOCHASTIC, "nonfinite": "raise"}),
    "simba, stochastic": ("simba", STOCHASTIC),
}


def wholes(step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The parameters (step -1) or their gradients."""
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def make(case: str, params: list[torch.Tensor], **options: Any) -> steepest.Optimizer:
    name, own = RULES[case]
    return steepest.create(name, params, **{"lr": 0.05, "weight_decay": 0.1, **own, **options})


def in_one_process(case: str, dtype: torch.dtype, **options: Any) -> tuple[list[Any], Any]:
    params = [Parameter(whole) for whole in wholes(-1, dtype)]
    optimizer = make(case, params, **options)
    for step in range(STEPS):
        for param, grad in zip(params, wholes(step, dtype), strict=True):
            param.grad = grad
        optimizer.step()
    return params, optimizer


def on_mesh(case: str, dtype: torch.dtype, layout: str, **options: Any) -> tuple[list[Any], Any]:
    mesh_shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", mesh_shape)
    params = [Parameter(placed(whole, mesh, placements)) for whole in wholes(-1, dtype)]
    optimizer = make(case, params, **options)
    for step in range(STEPS):
        for param, grad in zip(params, wholes(step, dtype), strict=True):
            param.grad = placed(grad, mesh, placements)
        optimizer.step()
    return params, optimizer


def assert_parts(params: list[Any], optimizer: Any, whole: list[Any], expected: Any) -> None:
    """Parameters and state are this rank's parts of the whole ones, as torch cuts them."""
    for param, theirs in zip(params, whole, strict=True):
        assert_part(param.detach(), theirs.detach(), param)
        assert optimizer.state[param].keys() == expected.state[theirs].keys()
        for name, entry in expected.state[theirs].items():
            own = optimizer.state[param][name]
            if name in PER_TENSOR:
                assert type(own) is torch.Tensor
                assert torch.equal(own, entry)
            else:
                assert own.shape == entry.shape
                assert_part(own, entry, param)


def assert_part(own: Any, whole: torch.Tensor, param: Any) -> None:
    assert isinstance(own, DTensor)
    assert (own.device_mesh, own.placements, own.dtype) == (param.device_mesh, param.placements, whole.dtype)
    part = placed(whole, param.device_mesh, param.placements).to_local()
    torch.testing.assert_close(own.to_local(), part, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *((layout, torch.bfloat16) for layout in LAYOUTS),
        ("HSDP", torch.float32),
        ("FSDP x TP, rows", torch.float64),
    ],
    ids=str,
)
def test_parameters_and_state_equal_one_process(layout: str, dtype: torch.dtype):
    whole = {case: in_one_process(case, dtype) for case in RULES}

    def work(rank: int) -> None:
        for case in RULES:
            assert_parts(*on_mesh(case, dtype, layout), *whole[case])

    run_on_ranks(work)


def test_noise_that_was_indexed_by_the_shard_would_differ(monkeypatch: pytest.MonkeyPatch):
    """The negative control of the test above."""
    from steepest.engine.layout import Extent

    whole, _ = in_one_process("lion, stochastic", torch.bfloat16)
    monkeypatch.setattr(Extent, "within", lambda shape, first: Extent.of(shape))

    def work(rank: int) -> int:
        params, _ = on_mesh("lion, stochastic", torch.bfloat16, "FSDP")
        return sum(
            not torch.equal(own.to_local(), placed(theirs, own.device_mesh, own.placements).to_local())
            for own, theirs in zip(params, whole, strict=True)
        )

    assert sum(run_on_ranks(work)) >= 4


@pytest.mark.parametrize("case", ["adamw", "simba"])
def test_complex_parameters(case: str):
    def values(step: int) -> torch.Tensor:
        return torch.randn(5, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(step + 1))

    whole = Parameter(values(-1))
    expected = make(case, [whole])
    for step in range(STEPS):
        whole.grad = values(step)
        expected.step()

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        param = Parameter(placed(values(-1), mesh, [Shard(0)]))
        optimizer = make(case, [param])
        for step in range(STEPS):
            param.grad = placed(values(step), mesh, [Shard(0)])
            optimizer.step()
        part = placed(whole.detach(), mesh, [Shard(0)])
        assert torch.equal(param.to_local(), part.to_local())
        for name, entry in expected.state[whole].items():
            if name != "step":
                own = placed(entry, mesh, [Shard(0)])
                assert torch.equal(optimizer.state[param][name].to_local(), own.to_local())
        assert optimizer.explain().rows[0].shape == (5, 3)

    run_on_ranks(work, 2)


@pytest.mark.parametrize("placement", [Shard(0), Shard(1)], ids=str)
def test_compiled_steps_draw_by_the_logical_place_too(placement: Shard):
    """Columns have gaps between their places, so they are left to the eager pass."""
    start, grad = torch.randn(9, 8).bfloat16(), torch.randn(9, 8).bfloat16()
    whole = Parameter(start.clone())
    whole.grad = grad
    steepest.SignGSD([whole], lr=0.05, **STOCHASTIC).step()
    with alone_as(1, 2):
        mesh = init_device_mesh("cpu", (2,))
        param = Parameter(placed(start, mesh, [placement]))
        param.grad = placed(grad, mesh, [placement])
        steepest.SignGSD([param], lr=0.05, compile=True, **STOCHASTIC).step()
        assert torch.equal(param.to_local(), region_of(param).of(whole))


def test_gradients_laid_out_otherwise_are_redistributed():
    """A norm's under sequence parallelism are to be summed; a tensor-parallel embedding's are replicated."""
    start = torch.arange(10.0).view(5, 2)
    grads = [torch.full((5, 2), 2.0**rank) for rank in range(WORLD)]
    whole = Parameter(start.clone())
    expected = steepest.SGD([whole], lr=0.5, momentum=0.9)
    whole.grad = sum(grads)
    expected.step()

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        for nonfinite in ("ignore", "skip"):
            for placement in (Shard(0), Shard(1), Replicate()):
                partial = DTensor.from_local(grads[rank], mesh, [Partial()])
                replicated = DTensor.from_local(sum(grads), mesh, [Replicate()])
                # The third has not arrived when the step begins.
                for given in (partial, replicated, partial.redistribute(mesh, [placement], async_op=True)):
                    param = Parameter(placed(start.clone(), mesh, [placement]))
                    optimizer = steepest.SGD([param], lr=0.5, momentum=0.9, nonfinite=nonfinite)
                    param.grad = given
                    optimizer.step()
                    assert param.grad is given
                    assert_parts([param], optimizer, [whole], expected)

    run_on_ranks(work)


def test_a_replicated_gradient_of_what_fsdp_and_tp_cut():
    def work(rank: int) -> None:
        mesh_shape, placements = LAYOUTS["FSDP x TP, rows"]
        mesh = init_device_mesh("cpu", mesh_shape)
        param = Parameter(placed(torch.zeros(8, 2), mesh, placements))
        whole = torch.arange(16.0).view(8, 2)
        param.grad = DTensor.from_local(whole, mesh, [Replicate(), Replicate()])
        steepest.SGD([param], lr=1.0, momentum=0.0).step()
        assert torch.equal(param.detach().to_local(), -region_of(param).of(whole))

    run_on_ranks(work)


def test_a_plain_gradient_of_a_dtensor_is_refused_by_name():
    with alone_as(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        param = Parameter(placed(torch.ones(4), mesh, [Shard(0)]))
        param.grad = torch.ones(4)
        with pytest.raises(ValueError, match="'w' is a DTensor, but its gradient is not"):
            steepest.Lion([("w", param)]).step()


def test_state_is_counted_and_explained():
    with alone_as(1, 2):
        mesh = init_device_mesh("cpu", (2,))
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3))
        for layer in model:
            for name, param in list(layer.named_parameters()):
                setattr(layer, name, Parameter(placed(param.detach(), mesh, [Shard(0)])))
        optimizer = steepest.build(model, "lion")
        assert {row.name for row in optimizer.explain().rows} == dict(model.named_parameters()).keys()
        assert optimizer.explain().totals[0].state_bytes == 4 * (20 + 5 + 15 + 3)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        # The second rank of two holds the smaller parts of five and three rows.
        assert optimizer.state_bytes() == 4 * (2 * 4 + 2 + 1 * 5 + 1)


def test_shards_that_are_kept_on_the_host_have_their_state_there():
    """As FSDP2's CPUOffloadPolicy makes them: the mesh is an accelerator's."""
    with alone_as(1, 2):
        mesh = DeviceMesh("cuda", [0, 1])
        meta = TensorMeta(torch.Size([5, 3]), (3, 1), torch.float32)
        spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=meta)
        param = Parameter(DTensor(torch.ones(2, 3), spec, requires_grad=False))
        param.grad = DTensor(torch.ones(2, 3), spec, requires_grad=False)
        optimizer = steepest.Lion([param], lr=0.5, weight_decay=0.0)
        optimizer.step()
        entry = optimizer.state[param]["exp_avg"]
        assert (entry.to_local().device.type, entry.shape) == ("cpu", (5, 3))
        # What the first step has written, and not a copy from before it.
        assert torch.equal(entry.to_local(), torch.full((2, 3), 1 - 0.99))
        again = steepest.Lion([param], lr=0.5)
        again.load_state_dict(optimizer.state_dict())
        assert torch.equal(again.state[param]["exp_avg"].to_local(), entry.to_local())
        assert param.detach().to_local().eq(0.5).all()
        with pytest.raises(ValueError, match=r"'w' is a DTensor: state_device='cpu' .*CPUOffloadPolicy"):
            steepest.Lion([("w", param)], state_device="cpu")


def test_a_parameter_without_gradient_has_no_state_and_others_go_on():
    with alone_as(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        params = [Parameter(placed(torch.ones(4), mesh, [Shard(0)])) for _ in range(2)]
        optimizer = steepest.Lion(params, lr=0.5, weight_decay=0.0)
        params[1].grad = torch.ones_like(params[1])
        optimizer.step()
        assert [len(optimizer.state.get(param, {})) for param in params] == [0, 1]
        assert [param.to_local()[0].item() for param in params] == [1.0, 0.5]
