from __future__ import annotations

import pytest
import torch
from torch import Tensor

import steepest
from steepest.lab.training.state_memory import state_bytes


def stepped(optimizer: torch.optim.Optimizer, weight: Tensor) -> torch.optim.Optimizer:
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", ["signgsd", "lion", "simba", "adamw"])
def test_counting_tensors_agrees_with_the_optimizers_own_count(name: str) -> None:
    weight = torch.zeros(1000, requires_grad=True)
    optimizer = stepped(steepest.create(name, [weight]), weight)
    own = optimizer.state_bytes()  # type: ignore[attr-defined]
    optimizer.state_bytes = None  # type: ignore[attr-defined]
    # Only one of the two counts may include scalars such as the step count.
    assert state_bytes(optimizer) == pytest.approx(own, abs=16)


def test_adam_has_two_floats_per_parameter_and_a_step_count() -> None:
    weight = torch.zeros(1000, requires_grad=True)
    assert state_bytes(stepped(torch.optim.Adam([weight]), weight)) == 8000 + 4


def test_a_shared_storage_is_counted_once() -> None:
    weight = torch.zeros(10, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    buffer = torch.zeros(100)
    optimizer.state[weight] = {"a": buffer, "b": buffer[10:]}
    assert state_bytes(optimizer) == 400


def test_tensors_in_nested_dicts_and_lists_are_counted() -> None:
    weight = torch.zeros(10, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight] = {0: {"Q": [torch.zeros(3), (torch.zeros(2),)]}, "name": "none"}
    assert state_bytes(optimizer) == 20
