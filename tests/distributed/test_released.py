"""Optimizer in backward with sharded parameters: each process steps its shards, or it is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import Module, Parameter

import steepest

from .gloo_job import MESHES, RELEASED
from .ranks import WORLD, alone_as, placed, run_on_ranks


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", RELEASED)
def test_fully_shard_with_steps_in_backward_equals_ordinary_steps(case: str, mesh: str, processes: list[Any]):
    for done in processes:
        ends, expected = (done["released"][f"{case} {mesh}{kind}"] for kind in ("", ", ordinary"))
        assert ends.keys() == expected.keys()
        assert all(torch.equal(ends[name], expected[name]) for name in ends)
        assert done["released"][f"{case} {mesh}, freed"] is True


class Product(Module):
    """A weight and a vector, each multiplied by what its gradient is to be."""

    def __init__(self, mesh: Any, placements: Any) -> None:
        super().__init__()
        self.weight = Parameter(placed(torch.linspace(-1, 1, 40).view(8, 5).bfloat16(), mesh, placements))
        self.vector = Parameter(placed(torch.linspace(-1, 1, 6).bfloat16(), mesh, placements))

    def forward(self, scale: float) -> torch.Tensor:
        return sum(
            (param.to_local() * param.to_local().detach() * scale).sum() for param in self.parameters()
        )


@pytest.mark.parametrize("clip_value", [None, 0.25], ids=str)
@pytest.mark.parametrize("placements", [[Shard(0)], [Shard(1)]], ids=str)
def test_shards_are_stepped_in_backward(placements: Any, clip_value: float | None):
    def work(rank: int) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        model, twin = Product(mesh, placements), Product(mesh, placements)
        options = {"lr": 0.1, "rounding": "stochastic"}
        optimizer, ordinary = (steepest.AdamW(each.named_parameters(), **options) for each in (model, twin))
        with steepest.release_gradients(model, optimizer, clip_value=clip_value):
            for step in range(3):
                model(step - 1.0).backward()
                assert all(param.grad is None for param in model.parameters())
                optimizer.step()
                twin(step - 1.0).backward()
                if clip_value is not None:
                    for param in twin.parameters():
                        param.grad.to_local().clamp_(-clip_value, clip_value)
                ordinary.step()
                ordinary.zero_grad()
                for param, other in zip(model.parameters(), twin.parameters(), strict=True):
                    assert torch.equal(param.to_local(), other.to_local())
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            for name, entry in optimizer.state[param].items():
                theirs = ordinary.state[other][name]
                if isinstance(entry, DTensor):
                    entry, theirs = entry.to_local(), theirs.to_local()
                assert torch.equal(entry, theirs)

    run_on_ranks(work)


@pytest.mark.parametrize(
    ("options", "how", "error"),
    [
        (
            {"nonfinite": "skip"},
            {},
            "'weight' is a DTensor: nonfinite='skip' would skip it on some processes",
        ),
        ({"nonfinite": "raise"}, {}, "nonfinite='raise'"),
        ({}, {"clip_norm": 1.0}, "'weight' is a DTensor: clip_norm needs the norm of all shards.*clip_value"),
    ],
    ids=str,
)
def test_what_needs_all_shards_is_refused_by_name(options: Any, how: Any, error: str):
    with alone_as(0, 2):
        model = Product(init_device_mesh("cpu", (2,)), [Shard(0)])
        optimizer = steepest.Lion(model.named_parameters(), **options)
        with pytest.raises(ValueError, match=error):
            steepest.release_gradients(model, optimizer, **how)
        # The same, if the option is set afterwards.
        plain = steepest.Lion(model.named_parameters())
        if options:
            with steepest.release_gradients(model, plain):
                plain.param_groups[0].update(options)
                before = [param.detach().to_local().clone() for param in model.parameters()]
                with pytest.raises(RuntimeError, match=error):
                    model(1.0).backward()
                assert all(map(torch.equal, before, (p.detach().to_local() for p in model.parameters())))


def test_rules_that_need_whole_tensors_are_refused_by_name():
    with alone_as(0, 2):
        model = Module()
        model.weight = Parameter(placed(torch.ones(4, 2), init_device_mesh("cpu", (2,)), [Shard(0)]))
        optimizer = steepest.Muon(model.named_parameters())
        with pytest.raises(
            ValueError, match="'weight' is a DTensor: 'muon' needs whole tensors, and the proc"
        ):
            steepest.release_gradients(model, optimizer)


def test_a_gradient_that_is_to_be_redistributed_is_refused_by_name():
    with alone_as(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        model = Module()
        model.weight = Parameter(placed(torch.ones(4, 2), mesh, [Replicate()]))
        optimizer = steepest.Lion(model.named_parameters())
        steepest.release_gradients(model, optimizer)
        local = model.weight.to_local(grad_placements=[Partial()])
        with pytest.raises(
            RuntimeError, match=r"'weight' has the placements \(R\) and its gradient \(P\(sum\)\)"
        ):
            local.sum().backward()
        assert model.weight.detach().to_local().eq(1).all()


def test_whole_parameters_beside_shards_are_refused():
    with alone_as(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("pp", "tp"))["tp"]
        for beside in (torch.ones(2), placed(torch.ones(2), alone, [Shard(0)])):
            model = Product(mesh, [Shard(0)])
            model.norm = Parameter(beside)
            optimizer = steepest.Lion(model.named_parameters())
            steepest.release_gradients(model, optimizer)
            local = model.norm.to_local() if isinstance(model.norm, DTensor) else model.norm
            with pytest.raises(RuntimeError, match="released in one of 2 processes"):
                local.sum().backward()
            with pytest.raises(RuntimeError, match="released in one of 2 processes"):
                optimizer.step()
            assert local.eq(1).all()
