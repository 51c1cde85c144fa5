"""Matrix rules on DTensors equal one process that has the whole matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

import steepest

from .ranks import LAYOUTS, placed, run_on_ranks

SHAPES = [(8, 6), (7, 5), (3, 4), (12, 8), (8, 6), (4, 3, 5)]
STEPS = 3
EXACT = {"method": "svd"}
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "muon": ("muon", EXACT),
    "muon, batch": ("muon", {**EXACT, "view": "batch"}),
    "muon, l2": ("muon", {"ns_dtype": torch.float32, "weight_decay_method": "l2", "maximize": True}),
    "muon, cautious": ("muon", {**EXACT, "weight_decay_method": "cautious", "nonfinite": "skip"}),
    "muon, stochastic": ("muon", {**EXACT, "rounding": "stochastic", "seed": 3}),
    "normuon": ("normuon", {**EXACT}),
    "polargrad": ("polargrad", {**EXACT}),
    "scion": ("scion", {**EXACT}),
    "hyperball": ("hyperball", {**EXACT, "weight_decay": 0.0}),
    "hyperball, stochastic": (
        "hyperball",
        {**EXACT, "weight_decay": 0.0, "rounding": "stochastic", "seed": 5, "view": "batch"},
    ),
    "quad": ("quad", {}),
    "quad, gradient": ("quad", {"whiten": "gradient", "update_probability": 0.5}),
    "procrustes": ("procrustes", {"max_size_dense": 6}),
    "soap": ("soap", {}),
}


def wholes(step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The parameters (step -1) or their gradients."""
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def make(case: str, params: list[torch.Tensor], **options: Any) -> steepest.Optimizer:
    name, own = RULES[case]
    named = [(f"w{at}", param) for at, param in enumerate(params)]
    return steepest.create(name, named, **{"lr": 0.05, "weight_decay": 0.1, **own, **options})


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
    """Parameters and state are this rank's parts of the whole ones."""
    for at, (param, theirs) in enumerate(zip(params, whole, strict=True)):
        assert_part(param.detach(), theirs.detach(), param, f"parameter {at}")
        own, known = optimizer.state[param], expected.state[theirs]
        assert own.keys() <= known.keys()
        for name, entry in own.items():
            if isinstance(entry, DTensor):
                assert_part(entry, known[name], param, f"{name} of {at}")
            else:
                torch.testing.assert_close(entry, known[name], rtol=1e-5, atol=1e-6)


def assert_part(own: Any, whole: torch.Tensor, param: Any, what: str) -> None:
    part = placed(whole, param.device_mesh, param.placements).to_local()
    assert own.dtype == whole.dtype
    if not torch.equal(own.to_local(), part):
        torch.testing.assert_close(own.to_local(), part, rtol=1e-5, atol=1e-6, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_and_state_equal_one_process(layout: str):
    whole = {case: in_one_process(case, torch.float32) for case in RULES}

    def work(rank: int) -> None:
        for case in RULES:
            try:
                assert_parts(*on_mesh(case, torch.float32, layout), *whole[case])
            except BaseException as error:
                error.add_note(f"{case} on rank {rank}")
                raise

    run_on_ranks(work)
