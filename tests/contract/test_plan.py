"""A step's batches are kept while nothing has changed, and made anew by every kind of change."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steepest
from steepest.engine.collect import Collector
from steepest.engine.plan import Plan

SHAPES = [(8, 8), (6,), (4, 3, 2, 2), (6,), (), (100, 90)]
Change = Callable[[list[Parameter], steepest.Optimizer], None]


class Marked(Tensor):
    """A subclass of Tensor, as gradients may be."""


def give(params: list[Parameter], seed: int) -> None:
    """Give every parameter a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def trained(rule: str, compile: bool) -> tuple[list[Parameter], steepest.Optimizer]:
    """Parameters and an optimizer of two groups that has a plan, with gradients for the next step."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    named = [(f"layer{at}", param) for at, param in enumerate(params)]
    # Stochastic rounding, so that key words matter once the parameters are narrow.
    options: dict[str, Any] = {"compile": compile, "rounding": "stochastic", "nonfinite": "skip"}
    groups = [{"params": named[:3]}, {"params": named[3:], "lr": torch.tensor(0.03), "weight_decay": 0.1}]
    optimizer = steepest.create(rule, groups, lr=0.01, **options)
    for seed in range(3):
        give(params, seed)
        optimizer.step()
    give(params, 3)
    assert optimizer._collector._plan is not None
    return params, optimizer


def entry(params: list[Parameter], optimizer: steepest.Optimizer, at: int) -> tuple[dict[str, Any], str]:
    """A parameter's state, and the name of an entry that is not a count."""
    state = optimizer.state[params[at]]
    return state, next(name for name in state if name != "step")


def replace_data(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    params[0].data = params[0].data * 2


def transpose_data(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    params[0].data = params[0].data.t()


def narrow_data(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    for param in params:
        param.data = param.data.bfloat16()
    give(params, 4)


def swap(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    other = Parameter(torch.full_like(params[1], 0.5))
    other.grad = torch.ones_like(other)
    torch.utils.swap_tensors(params[1], other)


def replace_param(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    params[2] = optimizer.param_groups[0]["params"][2] = Parameter(torch.ones(4, 3, 2, 2))
    params[2].grad = torch.ones(4, 3, 2, 2)


def add_group(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    params.append(Parameter(torch.ones(5, 5)))
    optimizer.add_param_group({"params": [("new", params[-1])]})
    params[-1].grad = torch.ones(5, 5)


def remove_group(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    del optimizer.param_groups[1]


def replace_groups(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    optimizer.param_groups[:] = [{**group, "lr": 0.5} for group in optimizer.param_groups]


def rename(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    narrow_data(params, optimizer)
    optimizer.step()
    optimizer.param_groups[0]["param_names"] = ["a", "b", "c"]
    give(params, 5)


def take_gradient(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    params[1].grad = None


def bring_gradient(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    params[1].grad = None
    optimizer.step()
    give(params, 4)


def widen_gradient(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    params[3].grad = None
    params[3].grad_dtype = None
    params[3].grad = torch.linspace(0.1, 1.3, 6, dtype=torch.float64)


def stride_gradient(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    params[0].grad = params[0].grad.t().contiguous().t()


def sparse_gradient(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    params[0].grad = params[0].grad.to_sparse()


def subclass_gradient(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    params[0].grad = params[0].grad.as_subclass(Marked)


def negative_gradient(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    params[1].grad = torch._neg_view(params[1].grad)


def clear_state(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    optimizer.state.clear()


def drop_state(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    del optimizer.state[params[0]]


def edit_state(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    state, name = entry(params, optimizer, 0)
    state[name] = torch.ones_like(state[name])


def edit_in_place(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    state, name = entry(params, optimizer, 0)
    state[name].fill_(0.25)


def edit_data(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    state, name = entry(params, optimizer, 0)
    state[name].data = torch.ones_like(state[name])


def cast_state(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    for state in optimizer.state.values():
        for name in state:
            state[name] = state[name].to(torch.bfloat16 if name != "step" else torch.float32)


def recount(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    state = optimizer.state[params[0]]
    state["step" if "step" in state else "gsnr"].data.fill_(40.0)


def copy_state(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    for param, state in optimizer.state.items():
        optimizer.state[param] = {name: value.clone() for name, value in state.items()}


def load(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for name, value in state.items():
            if name != "step":
                value.mul_(0.5)
    optimizer.load_state_dict(saved)


def set_option(name: str, value: Any) -> Change:
    def change(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
        for group in optimizer.param_groups:
            group[name] = value

    return change


def fill_lr(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    optimizer.param_groups[1]["lr"].fill_(0.5)


def fail(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.01


def skip(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    params[0].grad[0, 0] = float("nan")
    optimizer.step()
    give(params, 4)


def move(params: list[Parameter], optimizer: steepest.Optimizer) -> None:
    model = torch.nn.ParameterList(params)
    model.double().float()


# Whether the plan notices a change itself, and must, or what a step reads anew is enough.
CHANGES: dict[str, tuple[Change, bool]] = {
    "parameter's data replaced": (replace_data, True),
    "parameter's data transposed": (transpose_data, True),
    "parameters narrowed": (narrow_data, True),
    "parameters swapped": (swap, True),
    "model moved": (move, True),
    "parameter replaced": (replace_param, True),
    "group added": (add_group, True),
    "group removed": (remove_group, True),
    "groups replaced": (replace_groups, True),
    "names changed": (rename, True),
    "gradient gone": (take_gradient, True),
    "gradient come": (bring_gradient, True),
    "gradient widened": (widen_gradient, True),
    "gradient strided": (stride_gradient, True),
    "gradient sparse": (sparse_gradient, True),
    "gradient of a subclass": (subclass_gradient, False),
    "gradient a negative view": (negative_gradient, True),
    "state cleared": (clear_state, True),
    "state dropped": (drop_state, True),
    "state edited": (edit_state, True),
    "state edited in place": (edit_in_place, False),
    "state's data replaced": (edit_data, True),
    "state cast": (cast_state, True),
    "state copied": (copy_state, True),
    "state loaded": (load, True),
    "step recounted": (recount, False),
    "weight decay set": (set_option("weight_decay", 0.3), False),
    "lr set": (set_option("lr", 0.3), False),
    "lr filled": (fill_lr, False),
    "nonfinite set": (set_option("nonfinite", "ignore"), False),
    "compile set": (set_option("compile", None), False),
    "maximize set": (set_option("maximize", True), True),
    "step failed": (fail, False),
    "step skipped": (skip, False),
}


def twin_of(
    params: list[Parameter], optimizer: steepest.Optimizer
) -> tuple[list[Parameter], steepest.Optimizer]:
    """Copies of all, gradients included, that have no plan."""
    others, other = copy.deepcopy((params, optimizer))
    for one, another in zip(params, others, strict=True):
        another.grad_dtype = one.grad_dtype
        # A copy, because cloning would resolve a negative view.
        another.grad = None if one.grad is None else one.grad.detach()
    assert other._collector._plan is None
    return others, other


def differ(name: str, rule: str, compile: bool) -> bool:
    """Return whether two steps after a change differ from those of an optimizer without a plan."""
    change, _ = CHANGES[name]
    params, optimizer = trained(rule, compile)
    change(params, optimizer)
    others, other = twin_of(params, optimizer)
    for seed in (None, 7):
        if seed is not None:
            for each in (params, others):
                give(each, seed)
        optimizer.step()
        other._collector = Collector()
        other.step()
    for one, another in zip(params, others, strict=True):
        states = optimizer.state[one], other.state[another]
        if not same(one, another) or states[0].keys() != states[1].keys():
            return True
        if not all(same(value, states[1][entry]) for entry, value in states[0].items()):
            return True
    return False


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


# A plan holds what it holds whatever runs: eager operations look at the tensors themselves, and compiled code
# at the memory alone. SGDSaI's numbers of whole tensors are handed to compiled code in another way.
WAYS = [
    *((name, "adamw", True) for name in CHANGES),
    *((name, "sgd_sai", False) for name in CHANGES),
    *((name, "sgd_sai", True) for name in CHANGES if name.startswith(("state", "step"))),
]


@pytest.mark.parametrize(("name", "rule", "compile"), WAYS)
def test_every_change_is_seen(name: str, rule: str, compile: bool):
    assert not differ(name, rule, compile)


@pytest.mark.parametrize("name", [name for name, (_, noticed) in CHANGES.items() if noticed])
def test_a_plan_that_is_not_checked_goes_wrong(name: str, monkeypatch: pytest.MonkeyPatch):
    check = Collector.check

    def blind(self: Collector, *given: Any) -> None:
        plan = self._plan
        check(self, *given)
        self._plan = plan

    # Compiled code reads memory as it was told to, where eager operations would look at the tensors. With the
    # checks nothing differs, as the test above shows.
    monkeypatch.setattr(Plan, "_holds", lambda *_: True)
    monkeypatch.setattr(Collector, "check", blind)
    monkeypatch.setattr(Collector, "forget", lambda *_: None)
    try:
        wrong = differ(name, "adamw", True)
    except (AttributeError, RuntimeError, AssertionError, TypeError, KeyError):
        wrong = True
    assert wrong


@pytest.mark.parametrize("rule", ["signgsd", "adamw", "muon"])
def test_a_plan_is_used_while_nothing_changes(rule: str, monkeypatch: pytest.MonkeyPatch):
    params = [Parameter(torch.ones(4, 4)), Parameter(torch.ones(5, 4))]
    optimizer = steepest.create(rule, params)
    for seed in range(2):
        assert optimizer._collector._plan is None
        give(params, seed)
        optimizer.step()
    plan = optimizer._collector._plan
    assert plan is not None
    for seed in range(3):
        optimizer.param_groups[0]["lr"] *= 0.5
        give(params, seed)
        optimizer.step()
        assert optimizer._collector._plan is plan


def test_no_plan_is_made_while_gradients_take_turns():
    params, optimizer = trained("adamw", False)
    for seed in range(4):
        give(params, seed)
        for param in params[seed % 2 :: 2]:
            param.grad = None
        optimizer.step()
        assert optimizer._collector._plan is None


def test_a_plan_keeps_no_gradient():
    params, optimizer = trained("adamw", False)
    optimizer.step()
    grads = [weakref.ref(param.grad) for param in params]
    optimizer.zero_grad()
    gc.collect()
    assert all(grad() is None for grad in grads)


def test_a_failed_step_keeps_no_gradient():
    params, optimizer = trained("adamw", False)
    set_option("nonfinite", "raise")(params, optimizer)
    optimizer.step()
    assert optimizer._collector._plan is not None
    params[0].grad[0, 0] = float("nan")
    grads = [weakref.ref(param.grad) for param in params]
    with pytest.raises(FloatingPointError):
        optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert all(grad() is None for grad in grads)


def test_what_was_dropped_is_freed_by_the_next_step():
    params, optimizer = trained("adamw", False)
    optimizer.step()
    old = [weakref.ref(tensor.untyped_storage()) for tensor in (params[0].data,)]
    plan = weakref.ref(optimizer._collector._plan)
    params[0].data = torch.ones(8, 8)
    optimizer.state.clear()
    optimizer.step()
    gc.collect()
    assert plan() is None
    assert all(storage() is None for storage in old)


def test_loading_frees_the_plan_at_once():
    _, optimizer = trained("adamw", False)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer._collector._plan is None


def test_a_plan_is_not_copied():
    params, optimizer = trained("adamw", False)
    _, other = copy.deepcopy((params, optimizer))
    assert other._collector._plan is None
    assert b"Plan" not in pickle.dumps(optimizer)


def test_tensors_with_a_plan_can_be_swapped():
    # torch.nn.Module.to() does so if told to, and refuses if anything else refers to the parameter.
    params, _ = trained("adamw", False)
    torch.utils.swap_tensors(params[0], Parameter(torch.ones(8, 8)))
    assert torch.equal(params[0], torch.ones(8, 8))


def test_tensors_that_torch_cannot_compare_have_changed(monkeypatch: pytest.MonkeyPatch):
    # A model that moved to another device; torch compares tensors of one device only.
    def refuse(*_: Any) -> bool:
        raise RuntimeError("Expected all tensors to be on the same device")

    params, optimizer = trained("adamw", False)
    others, other = twin_of(params, optimizer)
    plan = optimizer._collector._plan
    monkeypatch.setattr(Plan, "_holds", refuse)
    for each in (optimizer, other):
        each.step()
    assert optimizer._collector._plan is not plan
    assert all(map(same, params, others))
