"""Parameters and gradients that were given other data between two steps: stepped, or refused by name."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import steepest
from loops import for_each

from .cases import CASES, RULES, Case
from .training import identical, set_gradients, snapshot, steps, train


def _refused(optimizer: Any, params: list[Parameter], words: str) -> None:
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert identical(snapshot(optimizer, params), before)


@for_each("trained", [False, True])
@for_each("shape", [(3, 4), (1, 3), (5, 4, 3), (2, 1, 3), ()])
def test_another_shape_beside_an_old_gradient(rule: Case, shape: tuple[int, ...], trained: bool):
    """Some shapes would broadcast, silently."""
    params = rule.params(shapes=[(4, 3), (4, 3)])
    optimizer = rule.make([("first", params[0]), ("second", params[1])])
    steps(optimizer, params, range(3 * trained))
    set_gradients(params, 5)
    params[1].data = torch.ones(shape)
    _refused(optimizer, params, "parameter 'second' .*shape")


@for_each("rule", RULES)
def test_expanded_data(rule: Case):
    params = rule.params(shapes=[(4, 3), (4, 3)])
    optimizer = rule.make([("first", params[0]), ("second", params[1])])
    train(optimizer, params, 3)
    params[1].data = torch.ones(1, 3).expand(4, 3)
    _refused(optimizer, params, "parameter 'second' is expanded")


@for_each("rule", RULES)
def test_data_from_inference_mode(rule: Case):
    params = rule.params(shapes=[(4, 3), (4, 3)])
    optimizer = rule.make([("first", params[0]), ("second", params[1])])
    train(optimizer, params, 3)
    with torch.inference_mode():
        made = torch.ones(4, 3)
    params[1].data = made
    _refused(optimizer, params, "parameter 'second' was made in inference mode")
    with torch.inference_mode():
        made = Parameter(torch.ones(4, 3))
    with pytest.raises(ValueError, match="parameter 'odd' was made in inference mode"):
        rule.make([("odd", made)])


@for_each("case", CASES)
def test_a_step_in_inference_mode_is_a_step(case: Case):
    """Its state can be changed outside too."""
    params, twins = case.params(), case.params()
    optimizer, twin = case.make(params), case.make(twins)
    for step in range(4):
        set_gradients(params, step)
        with torch.inference_mode(step % 2 == 0):
            optimizer.step()
    assert identical(train(twin, twins, 4), params)


@for_each("rule", RULES)
def test_a_closure_has_gradients_in_inference_mode(rule: Case):
    """The whole step runs outside of that mode, so that nothing it makes is of use in the mode alone."""
    params = rule.params()
    optimizer = rule.make(params)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = sum((param * param).sum() for param in params)
        loss.backward()
        return loss

    with torch.inference_mode():
        assert not optimizer.step(closure).is_inference()
    assert not any(each.is_inference() for each in optimizer.state[params[0]].values())


@for_each("rule", RULES)
def test_parameters_left_on_the_meta_device(rule: Case):
    """A step would train nothing: ``to_empty()`` makes new parameters, and torch's optimizers say nothing."""
    params = rule.params(device="meta")
    for param in params:
        param.requires_grad_(False)
    left = Parameter(torch.ones(4, 3, device="meta"))
    optimizer = rule.make([*((f"frozen {at}", param) for at, param in enumerate(params)), ("weight", left)])
    for grad in (None, torch.ones_like(left)):
        left.grad = grad
        with pytest.raises(ValueError, match=r"'weight' is on the meta device.* Nothing was stepped"):
            optimizer.step()
        assert not optimizer.state


@for_each("rule", RULES)
def test_parameters_materialized_in_place(rule: Case):
    """Swapped or given other data, they are those of the optimizer."""
    params, twins = rule.params(device="meta"), rule.params()
    optimizer, twin = rule.make(params), rule.make(twins)
    for param, values in zip(params, rule.params(), strict=True):
        torch.utils.swap_tensors(param, values)
    assert identical(train(optimizer, params, 3), train(twin, twins, 3))


def test_parameters_left_on_the_meta_device_beside_one_stepped_in_backward():
    model = torch.nn.ParameterDict({"here": torch.ones(2), "left": torch.ones(2, device="meta")})
    optimizer = steepest.AdamW(model.items())
    steepest.release_gradients(model, optimizer)
    with pytest.raises(ValueError, match="'left' is on the meta device"):
        model["here"].sum().backward()
    assert torch.equal(model["here"], torch.ones(2))


def _memory(count: int = 40) -> torch.Tensor:
    return torch.arange(float(count))


OVERLAPPING = {
    "itself": lambda: [_memory().as_strided((4, 4), (2, 1))],
    "gaps": lambda: (lambda m: [m.as_strided((4, 4), (6, 1)), m.as_strided((4, 4), (6, 1), 2)])(_memory()),
    "columns and the whole": lambda: (lambda m: [m.view(4, 10)[:, 3:5], m.view(4, 10)])(_memory()),
    "another dtype": lambda: (lambda m: [m.view(4, 10)[:, 2:6], m.view(torch.float64).view(4, 5)[:, 2:]])(
        _memory()
    ),
}


@pytest.mark.parametrize("what", OVERLAPPING)
def test_memory_that_overlaps(what: str):
    """One step over both would lose the update of one."""
    params = [Parameter(each) for each in OVERLAPPING[what]()]
    with pytest.raises(ValueError, match="overlaps itself" if what == "itself" else "share memory"):
        steepest.Muon([(f"w{at}", param) for at, param in enumerate(params)])


def test_memory_that_does_not_overlap():
    memory = _memory()
    halves = [Parameter(memory.view(4, 10)[:, at::2]) for at in range(2)]
    woven = Parameter(_memory().as_strided((2, 2), (3, 2)))
    optimizer = steepest.Lion([*halves, woven], lr=0.5, weight_decay=0.0)
    for param in (*halves, woven):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(memory, _memory() - 0.5)


@for_each("rule", RULES)
def test_a_state_dict_that_was_loaded_in_inference_mode(rule: Case):
    params, twins = rule.params(), rule.params()
    optimizer, twin = rule.make(params), rule.make(twins)
    train(optimizer, params, 2)
    train(twin, twins, 2)
    with torch.inference_mode():
        optimizer.load_state_dict(optimizer.state_dict())
    steps(optimizer, params, range(2, 4))
    steps(twin, twins, range(2, 4))
    assert identical(params, twins)


@for_each("rule", RULES)
def test_a_complex_gradient_of_a_real_parameter(rule: Case):
    """Computing with its real part alone would be silent."""
    params = rule.params(shapes=[(4, 3), (4, 3)])
    optimizer = rule.make([("first", params[0]), ("second", params[1])])
    train(optimizer, params, 3)
    params[1].grad, params[1].grad_dtype = None, None
    params[1].grad = torch.ones(4, 3, dtype=torch.complex64)
    _refused(optimizer, params, "parameter 'second' is real, but its gradient is torch.complex64")


BAD_OBJECTS = {
    "a str": lambda: "weight",
    "torch.int64": lambda: Parameter(torch.ones(4, 3, dtype=torch.int64), requires_grad=False),
    "sparse": lambda: Parameter(torch.ones(4, 3).to_sparse()),
    "expanded": lambda: Parameter(torch.ones(1).expand(4, 3)),
}


@for_each("words", BAD_OBJECTS)
def test_an_object_that_cannot_be_stepped_is_put_into_a_group(rule: Case, words: str):
    """What the constructor refuses, a step refuses too."""
    params = rule.params(shapes=[(4, 3), (4, 3)])
    optimizer = rule.make(params)
    train(optimizer, params, 2)
    made, group = BAD_OBJECTS[words](), optimizer.param_groups[0]
    group["params"] = [params[0], made]
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=f"parameter 1 of group 0.*{words}"):
        optimizer.step()
    assert identical(params, before)
    group["params"] = params
    optimizer.step()


@for_each("rule", RULES)
def test_memory_of_another_parameter_is_put_into_a_group(rule: Case):
    params = rule.params(shapes=[(4, 3), (4, 3)])
    optimizer = rule.make([("first", params[0]), ("second", params[1])])
    train(optimizer, params, 2)
    optimizer.param_groups[0]["params"] = [params[0], Parameter(params[0].detach())]
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()


@for_each("rule", RULES)
def test_a_nameless_parameter_is_put_into_a_group_of_named_ones(rule: Case):
    params, twins = rule.params(shapes=[(4, 3)] * 2), rule.params(shapes=[(4, 3)] * 2)
    optimizer, twin = rule.make([("first", params[0])]), rule.make(twins)
    optimizer.param_groups[0]["params"].append(params[1])
    if rule.name not in ("simba_leaky", "quad", "procrustes"):  # whose noise knows a parameter by its name
        assert identical(train(optimizer, params), train(twin, twins))
    params[1].grad = torch.ones(4, 3)
    optimizer.param_groups[0]["nonfinite"] = "raise"
    params[1].grad.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=re.escape("parameter 1 of group 0 (shape (4, 3))")):
        optimizer.step()
    assert [row.name for row in optimizer.explain().rows] == ["first", "parameter 1 of group 0"]


@for_each(
    ("key", "value", "words"),
    [
        ("lr", torch.tensor(torch.nan), "lr must be a finite number"),
        ("lr", torch.tensor(True), "lr must be a finite number"),
        ("lr", 10**400, "lr must be a finite number"),
        ("lr", Fraction(10**400), "lr must be a finite number"),
        ("base_lr", "0.1", "base_lr must be"),
        ("base_lr", 10**400, "base_lr must be"),
        ("weight_decay", Fraction(10**400), "weight_decay must be"),
        ("rule", ["lion"], "unknown rule"),
        ("params", None, "params must be a list"),
        ("param_names", 3, "param_names must be a list"),
        ("param_names", [3, 4], "param_names must be a list"),
        *[(key, ..., key) for key in ("lr", "base_lr", "rule", "params", "weight_decay")],
    ],
)
def test_a_live_group_s_own_entries(rule: Case, key: str, value: Any, words: str):
    params = rule.params(shapes=[(4, 3), (4, 3)])
    optimizer = rule.make(params)
    train(optimizer, params, 2)
    group, before = optimizer.param_groups[0], [param.detach().clone() for param in params]
    good = group.get(key)
    if value is ...:
        del group[key]
    else:
        group[key] = value
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert identical(params, before)
    group[key] = good
    optimizer.step()


def test_names_that_are_no_strings():
    with pytest.raises(ValueError, match=r"group 0: .* whose name is a str, got \(0, "):
        steepest.Lion(enumerate([Parameter(torch.ones(2))]))


@for_each("value", ["0", -1, None, 0.5])
def test_a_count_of_skipped_steps_that_is_none(rule: Case, value: Any):
    params = rule.params()
    optimizer = rule.make(params)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["skipped_steps"] = value
    with pytest.raises(ValueError, match="skipped_steps must be an integer ≥ 0"):
        optimizer.load_state_dict(saved)


@for_each("rule", RULES)
def test_one_group_s_parameters_are_replaced_and_another_s_are_gone(rule: Case):
    params = rule.params(shapes=[(4, 3), (4, 3)])
    optimizer = rule.make([{"params": params[:1]}, {"params": params[1:]}])
    train(optimizer, params, 1)
    optimizer.param_groups[0]["params"] = [Parameter(params[0].detach().clone())]
    optimizer.param_groups[1]["params"] = None
    with pytest.raises(ValueError, match="group 1: params must be a list"):
        optimizer.step()
