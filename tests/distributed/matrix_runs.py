"""Runs of a matrix rule in one process and on shards, to compare."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from .ranks import LAYOUTS, placed

SHAPES = [(8, 6), (7, 5), (12, 8), (3, 4), (8, 6), (16, 4), (4, 4), (6, 9)]
EXACT = {"method": "svd", "lr": 0.05, "weight_decay": 0.1}


def wholes(step: int, shapes: Any = SHAPES, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The parameters (step -1) or their gradients."""
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def named(params: list[Any]) -> list[tuple[str, Any]]:
    return [(f"w{at}", param) for at, param in enumerate(params)]


def train(optimizer: Any, params: list[Any], steps: int, grad_of: Any) -> None:
    for step in range(steps):
        for at, param in enumerate(params):
            param.grad = grad_of(step)[at]
        optimizer.step()


def alone(
    make: Any, steps: int = 3, shapes: Any = SHAPES, dtype: torch.dtype = torch.float32
) -> tuple[list[Any], Any]:
    params = [Parameter(whole) for whole in wholes(-1, shapes, dtype)]
    optimizer = make(named(params))
    train(optimizer, params, steps, lambda step: wholes(step, shapes, dtype))
    return params, optimizer


def sharded(
    make: Any, layout: str, steps: int = 3, shapes: Any = SHAPES, dtype: torch.dtype = torch.float32
) -> tuple[list[Any], Any]:
    mesh_shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", mesh_shape)

    def cut(step: int) -> list[Any]:
        return [placed(whole, mesh, placements) for whole in wholes(step, shapes, dtype)]

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
