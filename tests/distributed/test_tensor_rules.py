"""Tensor rules on DTensors equal one process that has the whole tensors, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import Parameter

import steepest
from steepest.compat import SGD_sai
from steepest.engine import pipeline, sums
from steepest.engine.sums import Summand, moments

from .ranks import LAYOUTS, WORLD, placed, run_on_ranks
from .test_element_rules import SHAPES, STEPS, STOCHASTIC, assert_parts, wholes

RULES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "sgd_sai": ("sgd_sai", torch.float32, {}),
    "sgd_sai, max": ("sgd_sai", torch.float64, {"normalize": "max", "nonfinite": "skip"}),
    "sgd_sai, warmup": ("sgd_sai", torch.float32, {"warmup_batches": 3, "relative_eps": True}),
    "sgd_sai, stochastic": ("sgd_sai", torch.bfloat16, STOCHASTIC),
    "simba_leaky": ("simba_leaky", torch.float32, {"nonfinite": "raise"}),
    "simba_leaky, stochastic": ("simba_leaky", torch.bfloat16, STOCHASTIC),
}
Place = Callable[[Tensor], Any]


def make(case: str, params: list[Any], **options: Any) -> Any:
    name, _, own = RULES[case]
    return steepest.create(name, params, **{"lr": 0.05, "weight_decay": 0.1, **own, **options})


def gradients(case: str, step: int) -> list[Tensor]:
    """With a mean, which the scales of SGDSaI are sensitive to; at the first step, one is zero."""
    grads = [grad + 0.5 for grad in wholes(step, RULES[case][1])]
    return [grad * (step > 0 or at != 1) for at, grad in enumerate(grads)]


def train(case: str, place: Place, **options: Any) -> tuple[list[Any], Any]:
    params = [Parameter(place(whole)) for whole in wholes(-1, RULES[case][1])]
    optimizer = make(case, params, **options)
    for step in range(STEPS):
        for param, grad in zip(params, gradients(case, step), strict=True):
            param.grad = place(grad)
        optimizer.step()
    return params, optimizer


def on_mesh(layout: str) -> Place:
    mesh_shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", mesh_shape)
    return lambda whole: placed(whole, mesh, placements)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_and_state_equal_one_process(layout: str):
    whole = {case: train(case, torch.clone) for case in RULES}

    def work(rank: int) -> None:
        for case in RULES:
            assert_parts(*train(case, on_mesh(layout)), *whole[case])

    run_on_ranks(work)


def test_compiled_sums_equal_one_process_too():
    whole = train("simba_leaky", torch.clone, compile=True)
    assert all(map(torch.equal, whole[0], train("simba_leaky", torch.clone, compile=False)[0]))

    def work(rank: int) -> None:
        assert_parts(*train("simba_leaky", on_mesh("HSDP"), compile=True), *whole)

    run_on_ranks(work)


@pytest.mark.parametrize("case", RULES)
def test_sums_of_each_shard_alone_would_differ(case: str, monkeypatch: pytest.MonkeyPatch):
    """The negative control of the test above."""
    whole, _ = train(case, torch.clone)
    monkeypatch.setattr(sums, "reduce_over_shards", lambda numbers, owners, by: numbers)
    # Each shard has its own idea of what is still to be measured, so some processes would wait for others.
    monkeypatch.setattr(pipeline, "adds_up_shards", lambda groups, states: False)

    def work(rank: int) -> int:
        params, _ = train(case, on_mesh("FSDP"))
        return sum(
            not torch.equal(own.to_local(), placed(theirs, own.device_mesh, own.placements).to_local())
            for own, theirs in zip(params, whole, strict=True)
        )

    assert sum(run_on_ranks(work)) >= 4


def test_the_scale_of_a_quarter_is_half():
    """Which is why SGDSaI needs whole tensors."""
    grad = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    scales = []
    for part in (grad, grad[:64]):
        param = Parameter(torch.zeros_like(part))
        param.grad = part.clone()
        optimizer = steepest.SGDSaI([param])
        optimizer.step()
        scales.append(optimizer.state[param]["gsnr"].item())
    assert scales[1] / scales[0] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("case", ["sgd_sai", "sgd_sai, stochastic", "simba_leaky"])
def test_an_element_that_is_not_finite_is_ignored_alike(case: str, value: float):
    def spoiled(place: Place) -> tuple[list[Any], Any]:
        # The second parameter is not stepped before, the third is.
        params = [Parameter(place(whole)) for whole in wholes(-1, RULES[case][1])]
        optimizer = make(case, params, nonfinite="ignore")
        for step in range(STEPS):
            grads = gradients(case, step)
            for at, first in ((1, 0), (2, 1)):
                if step == first:
                    grads[at][-1, -1] = value
            for param, grad in zip(params, grads, strict=True):
                param.grad = place(grad)
            optimizer.step()
        return params, optimizer

    whole = spoiled(torch.clone)

    def work(rank: int) -> None:
        for layout in ("FSDP", "FSDP x TP, columns"):
            assert_parts(*spoiled(on_mesh(layout)), *whole)

    run_on_ranks(work)


# Mesh dimension by mesh dimension: how many of the shapes it shards.
SHARDED = {
    "FSDP": [5],
    "columns": [4],
    "replicated": [],
    "HSDP": [5],
    "FSDP x TP, columns": [5, 4],
    "rows twice": [5, 5],
}


@pytest.mark.parametrize("layout", SHARDED)
@pytest.mark.parametrize(("case", "each"), [("sgd_sai", 2), ("simba_leaky", 1)])
def test_what_is_sent(case: str, each: int, layout: str, monkeypatch: pytest.MonkeyPatch):
    sent: list[tuple[int, torch.dtype, int]] = []
    real = dist.all_reduce

    def all_reduce(table: Tensor, **how: Any) -> None:
        # Agreement takes the maximum of integers.
        if table.dtype == torch.float64 or how["op"] == dist.ReduceOp.SUM:
            sent.append((dist.get_rank(), table.dtype, table.numel()))
        real(table, **how)

    def work(rank: int) -> None:
        place = on_mesh(layout)
        params = [Parameter(place(whole)) for whole in wholes(-1, torch.float32)]
        optimizer = make(case, params, nonfinite="ignore")
        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        # Without gradients nothing is sent.
        optimizer.step()
        for step in range(2):
            for param, grad in zip(params, wholes(step, torch.float32), strict=True):
                param.grad = place(grad)
            optimizer.step()

    run_on_ranks(work)
    steps = 1 if case == "sgd_sai" else 2
    once = [(torch.float64, count) for count in SHARDED[layout]]
    once += [(torch.int64, each * count) for count in SHARDED[layout]]
    for rank in range(WORLD):
        assert [call[1:] for call in sent if call[0] == rank] == once * steps


@settings(derandomize=True, deadline=None, database=None, max_examples=24)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=17),
    st.sampled_from(list(LAYOUTS)),
    st.randoms(use_true_random=False),
)
def test_no_cut_and_no_order_changes_a_bit(values: list[float], layout: str, random: Any):
    def summed(values: list[float], place: Place) -> list[Any]:
        vector, column, row = (
            torch.tensor(values).view(shape) for shape in ((-1,), (len(values), 1), (1, len(values)))
        )
        grads = [place(each) for each in (vector, column, row)]
        local = [each.to_local() if isinstance(each, DTensor) else each for each in grads]
        return moments([Summand(grad, owner) for grad, owner in zip(local, grads, strict=True)])

    expected = summed(values, torch.clone)
    order = random.sample(values, len(values))
    assert expected[0] == expected[1] == expected[2]

    def work(rank: int) -> None:
        assert summed(order, on_mesh(layout)) == expected

    run_on_ranks(work)


def test_gradients_laid_out_otherwise_are_redistributed_before_they_are_summed():
    start, grad = torch.arange(10.0).view(5, 2), torch.arange(10.0).view(5, 2) - 3
    whole = Parameter(start.clone())
    whole.grad = grad * WORLD
    expected = steepest.SGDSaI([whole])
    expected.step()

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        for placement in (Shard(0), Shard(1), Replicate()):
            param = Parameter(placed(start.clone(), mesh, [placement]))
            param.grad = DTensor.from_local(grad, mesh, [Partial()])
            optimizer = steepest.SGDSaI([param])
            optimizer.step()
            assert_parts([param], optimizer, [whole], expected)

    run_on_ranks(work)


def test_complex_and_plain_parameters_and_several_meshes():
    def values(step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(step + 1)
        shapes = [((5, 3), torch.complex64), ((6, 2), torch.float32), ((4,), torch.float32)]
        return [torch.randn(shape, dtype=dtype, generator=generator) for shape, dtype in shapes]

    def trained(places: list[Place], rule: str) -> tuple[list[Any], Any]:
        params = [Parameter(place(each)) for place, each in zip(places, values(-1), strict=True)]
        optimizer = steepest.create(rule, params, lr=0.05)
        for step in range(2):
            for param, place, grad in zip(params, places, values(step), strict=True):
                param.grad = place(grad)
            optimizer.step()
        return params, optimizer

    whole = {rule: trained([torch.clone] * 3, rule) for rule in ("sgd_sai", "simba_leaky")}

    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        places: list[Place] = [
            lambda each: placed(each, mesh, [Shard(0), Shard(1)]),
            lambda each: placed(each, mesh["tp"], [Shard(0)]),
            torch.clone,
        ]
        for rule, (theirs, expected) in whole.items():
            params, optimizer = trained(places, rule)
            for param, other in zip(params[:2], theirs, strict=False):
                assert torch.equal(
                    param.detach().to_local(),
                    placed(other.detach(), param.device_mesh, param.placements).to_local(),
                )
            assert torch.equal(params[2], theirs[2])
            for name in {"gsnr", "measured"} & expected.state[theirs[0]].keys():
                for param, other in zip(params, theirs, strict=True):
                    assert torch.equal(optimizer.state[param][name], expected.state[other][name])

    run_on_ranks(work)


def test_scales_that_are_measured_ahead_are_those_of_whole_tensors():
    """``warmup_step()`` of the original's interface."""

    def measured(place: Place) -> list[Tensor]:
        params = [Parameter(place(whole)) for whole in wholes(-1, torch.float32)]
        optimizer = SGD_sai(params)
        for param, grad in zip(params, wholes(0, torch.float32), strict=True):
            param.grad = place(grad)
        optimizer.warmup_step()
        return [optimizer.state[param]["gsnr"] for param in params]

    expected = measured(torch.clone)
    assert len(expected) == len(SHAPES)
    run_on_ranks(lambda rank: torch.testing.assert_close(measured(on_mesh("FSDP")), expected, rtol=0, atol=0))
