"""Four processes that hold shards equal one process that has whole tensors, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from distributed.ranks import LAYOUTS, placed, run_on_ranks

from .cases import CASES, Case
from .training import gradient, values

STEPS = 3


def whole_run(case: Case, dtype: torch.dtype) -> tuple[list[Any], list[list[torch.Tensor]], Any, Any]:
    """Start, gradients, parameters and state of one process."""
    params = case.params(dtype)
    start, optimizer, grads = values(params), case.make(named(params), **OPTIONS), []
    for step in range(STEPS):
        grads.append([gradient(param, index, step) for index, param in enumerate(params)])
        for param, grad in zip(params, grads[-1], strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return start, grads, params, copy.deepcopy(optimizer.state_dict()["state"])


OPTIONS = {"rounding": "stochastic", "weight_decay": 0.1, "seed": 7}


def named(params: list[Any]) -> list[tuple[str, Any]]:
    return [(f"w{at}", param) for at, param in enumerate(params)]


def same(own: Any, whole: torch.Tensor) -> bool:
    """Whether this rank's part, or its copy, is what torch cuts from the whole tensor."""
    if isinstance(own, DTensor):
        own, whole = own.to_local(), placed(whole, own.device_mesh, own.placements).to_local()
    return own.dtype == whole.dtype and torch.equal(own, whole)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shards_equal_whole_tensors(case: Case):
    runs = {dtype: whole_run(case, dtype) for dtype in (torch.float32, torch.bfloat16)}

    def work(rank: int) -> None:
        for dtype, layout in ((torch.bfloat16, "FSDP"), (torch.float32, "FSDP x TP, columns")):
            start, grads, expected, state = runs[dtype]
            mesh_shape, placements = LAYOUTS[layout]
            mesh = init_device_mesh("cpu", mesh_shape)
            params = [Parameter(placed(each.clone(), mesh, placements)) for each in start]
            optimizer = case.make(named(params), **OPTIONS)
            for each in grads:
                for param, grad in zip(params, each, strict=True):
                    param.grad = placed(grad, mesh, placements)
                optimizer.step()
            for at, (param, other) in enumerate(zip(params, expected, strict=True)):
                assert same(param.detach(), other.detach()), f"parameter {at}, {layout}"
            found = optimizer.state_dict()["state"]
            for at, entries in state.items():
                assert found[at].keys() == entries.keys()
                for name, entry in entries.items():
                    assert same(found[at][name], entry), f"{name} of {at}, {layout}"

    run_on_ranks(work)
