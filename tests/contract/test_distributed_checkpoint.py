"""torch.distributed.checkpoint's habits, besides the exact resume that test_resume.py checks."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from loops import for_each

from .cases import CASES, Case, spread
from .resume_jobs import Net
from .training import gradient, identical, snapshot, steps

WAYS = {
    "nested": {"strict": False},
    "flat": {"strict": False, "flatten_optimizer_state_dict": True},
}


def _net(case: Case) -> Net:
    return Net(torch.float32, [case])


@for_each(("case", "way"), spread(CASES, WAYS))
def test_asking_a_trained_optimizer_changes_nothing(case: Case, way: str):
    net = _net(case)
    optimizer = case.make(net.parameters())
    steps(optimizer, list(net.parameters()), range(2))
    before = snapshot(optimizer, net.parameters())
    get_optimizer_state_dict(net, optimizer, options=StateDictOptions(**WAYS[way]))
    assert identical(snapshot(optimizer, net.parameters()), before)


@for_each(("case", "way"), spread(CASES, WAYS))
def test_asking_an_untrained_one_makes_its_state_and_takes_no_step(case: Case, way: str):
    net, twin = _net(case), _net(case)
    optimizer, other = (case.make(each.parameters(), weight_decay=0.125) for each in (net, twin))
    get_optimizer_state_dict(net, optimizer, options=StateDictOptions(**WAYS[way]))
    assert identical(list(net.parameters()), list(twin.parameters()))
    assert all(state["step"] == 0 for state in optimizer.state.values() if "step" in state)
    steps(optimizer, list(net.parameters()), range(3))
    steps(other, list(twin.parameters()), range(3))
    assert identical(snapshot(optimizer, net.parameters()), snapshot(other, twin.parameters()))


@for_each("case", CASES)
def test_flat_state_is_one_plain_value_a_name(case: Case):
    net = _net(case)
    optimizer = case.make(net.named_parameters())
    steps(optimizer, list(net.parameters()), range(2))
    flat = get_optimizer_state_dict(net, optimizer, options=StateDictOptions(**WAYS["flat"]))
    names = {f"state.layers.{i}.{name}" for i, p in enumerate(net.layers) for name in optimizer.state[p]}
    assert names == {name for name in flat if name.startswith("state.")}
    assert all(isinstance(flat[name], (torch.Tensor, int, float)) for name in names)


def _go_on(net: Net, optimizer: Any, which: range) -> None:
    """The second parameter's gradient comes from step 3 on."""
    for step in which:
        for index, param in enumerate(net.layers):
            param.grad = None if index == 1 and step < 3 else gradient(param, index, step)
        optimizer.step()


@for_each(("case", "way"), spread(CASES, WAYS))
def test_a_parameter_whose_gradient_has_not_come_yet(case: Case, way: str):
    options = StateDictOptions(**WAYS[way])
    net, twin = _net(case), _net(case)
    optimizer, other = case.make(net.parameters()), case.make(twin.parameters())
    _go_on(net, optimizer, range(2))
    _go_on(twin, other, range(5))
    saved = get_optimizer_state_dict(net, optimizer, options=options)
    optimizer.zero_grad()
    again = case.make(net.parameters())
    set_optimizer_state_dict(net, again, saved, options=options)
    _go_on(net, again, range(2, 5))
    assert identical(list(net.parameters()), list(twin.parameters()))


@for_each(("case", "way"), spread(CASES, WAYS))
def test_a_frozen_parameter(case: Case, way: str):
    options = StateDictOptions(**WAYS[way])
    net, twin = _net(case), _net(case)
    for some in (net, twin):
        some.layers[1].requires_grad_(False)
    optimizer, other = case.make(net.parameters()), case.make(twin.parameters())
    _go_on(net, optimizer, range(2))
    _go_on(twin, other, range(3))
    saved = get_optimizer_state_dict(net, optimizer, options=options)
    optimizer.zero_grad()
    again = case.make(net.parameters())
    set_optimizer_state_dict(net, again, saved, options=options)
    _go_on(net, again, range(2, 3))
    assert identical(list(net.parameters()), list(twin.parameters()))


def test_only_torchs_own_function_of_that_name_keeps_a_first_step_from_being_taken():
    def _init_optim_state(optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    (param,) = params = Case("sgd").params(shapes=[(2,)])
    before = param.detach().clone()
    optimizer = Case("sgd").make(params)
    param.grad = torch.ones(2)
    _init_optim_state(optimizer)
    assert (param < before).all()
