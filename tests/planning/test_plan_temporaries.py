"""A plan's temporaries bound what a step is seen to hold, from nearby."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from distributed.ranks import alone_as
from peak_memory import highest
from steepest.rule import find_rule
from steepest.ternary import ternarize


def step(model: nn.Module, rule: str, **options: Any) -> steepest.Optimizer:
    """Build an optimizer, and take a step."""
    optimizer = steepest.build(model, rule, compile=False, **options)
    for param in model.parameters():
        param.grad = torch.full_like(param, 0.25)
    optimizer.step()
    return optimizer


def measured(model: nn.Module, rule: str, **options: Any) -> int:
    """The most that the first two steps hold, but for the state, in a thread that keeps no scratch yet."""
    optimizer = steepest.build(model, rule, compile=False, **options)
    for param in model.parameters():
        param.grad = torch.full_like(param, 0.25)
    found: list[int] = []

    def act() -> None:
        optimizer.step()
        optimizer.step()

    thread = threading.Thread(target=lambda: found.append(highest(act)))
    thread.start()
    thread.join()
    return found[0] - optimizer.state_bytes()


def layers(*shapes: tuple[int, int], dtype: torch.dtype = torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.ModuleList([nn.Linear(n, m, bias=False) for m, n in shapes])
    for layer in model:
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator).to(dtype)
    return nn.ModuleDict({"blocks": model})


SHAPES = ((256, 256), (256, 256), (128, 256), (8, 8))
# Eager steps hold up to a MiB of chunks that rules divide by what they hold at most; Newton-Schulz
# iterations on a CPU reuse memory that accelerators' do not.
NEAR = {"sgd": 4.0, "muon": 2.6, "normuon": 2.6, "scion": 2.6, "polargrad": 2.6, "adam_mini": 2.6}


NAMES = [name for name in steepest.list_optimizers() if name != "orthogonalized"]
NARROW = [
    name for name in NAMES if name not in ("quad", "soap", "hyperball", "scion", "normuon", "polargrad")
]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*[(name, torch.float32) for name in NAMES], *[(name, torch.bfloat16) for name in NARROW]],
    ids=str,
)
def test_the_bound_holds_and_is_near(name: str, dtype: torch.dtype):
    model = layers(
        *(SHAPES if find_rule(name).transforms else ((1024, 1024), (100, 100), (8, 8))), dtype=dtype
    )
    if find_rule(name).transforms:
        step(model, name)  # chooses ways by timing, with operands of its own
    plan = steepest.plan(model, name, compile=False)
    seen = measured(model, name)
    assert seen <= plan.temporary_bytes <= NEAR.get(name, 2.0) * seen, plan.temporary_bytes / seen


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw", {"state_dtype": "int8"}),
        ("adamw", {"state_dtype": "int8", "master": "split8", "rounding": "stochastic"}),
        ("lion", {"weight_decay": 0.1, "weight_decay_method": "cautious", "maximize": True}),
        ("muon", {"state_dtype": "int8", "master": "split8", "rounding": "stochastic"}),
        ("muon", {"bucket_bytes": 1}),
        ("soap", {"precondition_frequency": 2}),
        ("procrustes", {"update_probability": 0.5}),
    ],
    ids=str,
)
def test_the_bound_holds_for_options(name: str, options: dict[str, Any]):
    narrow = "master" in options
    model = layers((256, 256), (256, 256), (8, 8), dtype=torch.bfloat16 if narrow else torch.float32)
    step(model, name, **options)
    plan = steepest.plan(model, name, compile=False, **options)
    seen = measured(model, name, **options)
    assert seen <= plan.temporary_bytes <= 4 * seen, plan.temporary_bytes / seen


@pytest.mark.parametrize("name", ["muon", "procrustes"])
@pytest.mark.parametrize("rank", [0, 3])
def test_the_bound_holds_on_shards(name: str, rank: int):
    """One rank of four, without the others: what they would send is memory all the same."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    shapes = ((256, 256),) * 6 + ((256, 64), (8, 8))
    with alone_as(rank, 4):
        mesh = init_device_mesh("cpu", (4,))
        model = layers(*shapes)
        for layer in model["blocks"]:
            whole = layer.weight.detach()
            layer.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None))
        plan = steepest.plan(model, name, compile=False)
        step(model, name)
        seen = measured(model, name)
    assert seen <= plan.temporary_bytes <= 4 * seen, plan.temporary_bytes / seen


@pytest.mark.parametrize(
    "options", [{}, {"zero_pull": 0.1}, {"max_flip_fraction": 0.001}, {"accumulator": torch.int16}], ids=str
)
def test_the_bound_holds_for_ternary_weights(options: dict[str, Any]):
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 8))
    ternarize(model)
    plan = steepest.plan(model, "lion", ternary=options, compile=False)
    optimizer = steepest.build(model, "lion", ternary=options, compile=False)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 1024)).sum().backward()
        seen = highest(optimizer.step)
    assert seen <= plan.temporary_bytes <= 4 * seen, plan.temporary_bytes / seen


def test_offloaded_state_is_counted_in_host_memory():
    shapes = {"0.weight": (512, 512), "1.weight": (512, 512)}
    plan = steepest.plan(shapes, "lion", state_device="cpu", device="cuda")
    assert plan.host_bytes == plan.state_bytes == 2 * 4 * 512**2
    assert plan.temporary_bytes == 0
    # Three parameters and gradients in transfer, and a chunk.
    assert 3 * 2 * 4 * 512**2 < plan.host_temporary_bytes <= 3 * 2 * 4 * 512**2 + (1 << 20)
    assert plan.total_bytes == plan.parameter_bytes + plan.gradient_bytes
    there = steepest.plan(shapes, "lion", device="cuda")
    assert there.host_bytes == 0
    assert there.total_bytes > plan.total_bytes


def test_chunks_are_larger_on_an_accelerator():
    here, there = (
        steepest.plan({"0.weight": (8192, 8192)}, "lion", device=device).temporary_bytes
        for device in ("cpu", "cuda")
    )
    assert here <= 1 << 20
    assert 1 << 26 < there <= 1 << 27
