"""A state dict that does not fit raises, says why, and changes nothing."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch

from loops import for_each

from .cases import CASES, RULES, Case, spread
from .training import SHAPES, identical, snapshot, train


def _optimizer(case: Case, shapes: Any = SHAPES) -> tuple[Any, list[torch.Tensor]]:
    params = case.params(shapes=shapes)
    optimizer = case.make([{"params": params[:2]}, {"params": params[2:]}])
    train(optimizer, params, 2)
    return optimizer, params


_KEPT: dict[str, tuple[Any, list[torch.Tensor]]] = {}


def _kept(case: Case, shapes: Any = SHAPES) -> tuple[Any, list[torch.Tensor]]:
    """One optimizer for all tests that must leave it as it is: training takes most of their time."""
    key = f"{case} {shapes}"
    if key not in _KEPT:
        _KEPT[key] = _optimizer(case, shapes)
    return _KEPT[key]


def _refused(case: Case, saved: dict[str, Any], words: str) -> None:
    """Refused by an optimizer with the case's options, and by one with the rule's defaults."""
    _refused_by(case, saved, words)
    if case != (default := Case(case.rule.name)):
        _refused_by(default, saved, words)


def _refused_by(case: Case, saved: dict[str, Any], words: str) -> None:
    optimizer, params = _kept(case)
    before, kept = snapshot(optimizer, params), copy.deepcopy(saved)
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    assert identical(snapshot(optimizer, params), before)
    assert identical(saved, kept), "the caller's dict is left alone too"


def _saved(case: Case, shapes: Any = SHAPES) -> dict[str, Any]:
    return copy.deepcopy(_kept(case, shapes)[0].state_dict())


@for_each("rule", RULES)
@for_each("towards", [1, -1])
def test_another_rule_s(rule: Case, towards: int):
    """The names are compared, whatever the rules; in the alphabet those of a family are neighbors."""
    other = RULES[(RULES.index(rule) + towards) % len(RULES)]
    _refused(rule, _saved(other), rf"group 0 .*'{other.name}'.*'{rule.name}'")


@for_each("rule", RULES)
def test_one_group_s_rule_differs(rule: Case):
    saved = _saved(rule)
    saved["param_groups"][1]["rule"] = "some other"
    _refused(rule, saved, "group 1 .*'some other'")


@for_each("case", CASES)
def test_another_number_of_groups(case: Case):
    saved = _saved(case)
    saved["param_groups"].pop()
    _refused(case, saved, "different number of parameter groups")


@for_each("case", CASES)
def test_another_number_of_parameters(case: Case):
    saved = _saved(case)
    saved["param_groups"][0]["params"].pop()
    _refused(case, saved, "doesn't match the size")


@for_each(
    ("case", "shapes"),
    spread(
        CASES,
        [((3, 4), (5,), ()), ((4, 3), (6,), ()), ((4, 3), (5,), (1,)), ((12,), (5,), ()), ((), (5,), ())],
    ),
)
def test_another_shape(case: Case, shapes: Any):
    """Where there is state of the parameter's shape at all."""
    if [case.shape(shape) for shape in shapes] == [case.shape(shape) for shape in SHAPES]:
        return  # a vector and a scalar may be the same column
    saved = _saved(case, shapes)
    single = case.tensor_state | {"step"}
    if any(name not in single for state in saved["state"].values() for name in state):
        _refused(case, saved, "shape")


@for_each("case", CASES)
def test_a_missing_entry(case: Case):
    """A rule that made it anew would forget, or measure again, and say nothing."""
    optimizer, params = _kept(case)
    before, saved = snapshot(optimizer, params), copy.deepcopy(optimizer.state_dict())
    names = list(saved["state"][1])
    for name in names if len(names) > 1 else ():  # a parameter without any was not stepped yet
        broken = copy.deepcopy(saved)
        del broken["state"][1][name]
        if name == "step" and not case.rule.counts_steps:
            continue  # counted for its noise alone, which another format of the state may not need
        if broken["state"][1].keys() == case.tensor_state:
            continue  # measured ahead of the first step
        words = rf"the state of parameter 1 of group 0 .*has no '{name}', which '{case.rule.name}' needs"
        with pytest.raises(ValueError, match=words + "; nothing was loaded"):
            optimizer.load_state_dict(broken)
        assert identical(snapshot(optimizer, params), before)


@pytest.mark.parametrize("kept", ["gsnr", "measured"])
def test_half_of_a_scale(kept: str):
    """Both numbers may come without a momentum, but neither without the other."""
    case = Case("sgd_sai")
    saved = _saved(case)
    saved["state"][0] = {kept: saved["state"][0][kept]}
    _refused(case, saved, "'sgd_sai' needs")


@for_each("rule", RULES)
@for_each("value", ["x", -1.0, math.nan, None, 10**400])
@for_each("name", ["base_lr", "initial_lr"])
def test_a_base_lr_that_is_no_learning_rate(rule: Case, name: str, value: Any):
    saved = _saved(rule)
    saved["param_groups"][0][name] = value
    _refused(rule, saved, f"group 0 of the state dict: {name} must be a finite number ≥ 0")


@for_each("rule", RULES)
def test_named_parameters_in_another_order(rule: Case):
    """Their state would be given to each other."""

    def optimizer(*order: int) -> Any:
        params = rule.params(shapes=[(4, 3), (4, 3)])
        return rule.make([("ab"[at], params[at]) for at in order])

    saved = optimizer(0, 1).state_dict()
    with pytest.raises(ValueError, match=r"parameters \['a', 'b'\], but here they are \['b', 'a'\]; nothing"):
        optimizer(1, 0).load_state_dict(saved)
    optimizer(0, 1).load_state_dict(saved)


@pytest.mark.parametrize("given", [None, [], 3], ids=repr)
def test_no_dict_at_all(given: Any):
    optimizer, _ = _optimizer(Case("lion"))
    with pytest.raises(TypeError, match=f"takes a state dict, got {type(given).__name__}"):
        optimizer.load_state_dict(given)


@for_each("rule", RULES)
def test_state_of_a_parameter_that_is_in_no_group(rule: Case):
    saved = _saved(rule)
    saved["state"][7] = saved["state"].get(0, {})
    _refused(rule, saved, "state of 7, which is in none of its groups; nothing was loaded")


@for_each("case", CASES)
def test_a_per_tensor_number_must_be_one_number(case: Case):
    saved = _saved(case)
    names = [name for name, value in saved["state"][0].items() if value.dim() == 0]
    for name in names:
        for shape in ((7,), (4, 3)):
            broken = copy.deepcopy(saved)
            broken["state"][0][name] = torch.zeros(shape)
            _refused(case, broken, "shape")


@for_each("case", CASES)
def test_a_number_for_a_scalar_parameter_s_average(case: Case):
    """It has the shape of one; a step computes with a tensor."""
    optimizer, params = _kept(case)
    before, saved = snapshot(optimizer, params), copy.deepcopy(optimizer.state_dict())
    numbers = case.tensor_state | {"step"}
    for name in saved["state"][2].keys() - numbers:
        broken = copy.deepcopy(saved)
        broken["state"][2][name] = 1.0
        with pytest.raises(ValueError, match=f"'{name}' of parameter 0 of group 1 .* is a float"):
            optimizer.load_state_dict(broken)
        assert identical(snapshot(optimizer, params), before)


@for_each("rule", RULES)
def test_the_message_names_the_parameter(rule: Case):
    saved = _saved(rule)
    shaped = {name: value.shape for name, value in saved["state"][1].items() if value.dim() > 0}
    for name, shape in shaped.items():
        broken = copy.deepcopy(saved)
        broken["state"][1][name] = torch.zeros(2, 2)
        _refused(
            rule, broken, rf"'{name}' of parameter 1 of group 0 .*\(2, 2\).*{re.escape(str(tuple(shape)))}"
        )


@for_each("rule", RULES)
def test_values_out_of_range(rule: Case):
    for name, value in {"lr": -1.0, "weight_decay": float("nan"), "rounding": "up", "seed": -1}.items():
        saved = _saved(rule)
        saved["param_groups"][1][name] = value
        _refused(rule, saved, rf"group 1 .*{name}")


@for_each("rule", RULES)
def test_a_two_element_lr(rule: Case):
    saved = _saved(rule)
    saved["param_groups"][0]["lr"] = torch.ones(2)
    _refused(rule, saved, "1-element")


@for_each("case", CASES)
def test_a_refused_load_leaves_an_optimizer_that_steps_on(case: Case):
    optimizer, params = _optimizer(case)
    twin, twins = _optimizer(case)
    with pytest.raises(ValueError, match="groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert identical(train(optimizer, params, 2), train(twin, twins, 2))


STRUCTURES: dict[str, Any] = {
    "no groups": lambda saved: saved.pop("param_groups"),
    "no state": lambda saved: saved.pop("state"),
    "groups that are none": lambda saved: saved.update(param_groups=[1, 2]),
    "a group without params": lambda saved: saved["param_groups"][1].pop("params"),
    "params that are no numbers": lambda saved: saved["param_groups"][1].update(params=[[2]]),
    "state that is no dict": lambda saved: saved.update(state=[]),
    "a parameter's state that is no dict": lambda saved: saved["state"].update({0: 3}),
    "an entry without a name": lambda saved: saved["state"].update({0: {3: 1}}),
}


@for_each("rule", RULES)
@for_each("how", STRUCTURES)
def test_what_is_not_built_as_a_state_dict(rule: Case, how: str):
    saved = _saved(rule)
    STRUCTURES[how](saved)
    _refused(rule, saved, "of the state dict must be")


@for_each("rule", RULES)
@for_each(
    ("change", "words"),
    [(lambda t: t.to_sparse(), "layout torch.sparse_coo"), (lambda t: t.to("meta"), "has no data")],
)
def test_state_that_holds_no_dense_numbers(rule: Case, change: Any, words: str):
    for name, value in _saved(rule)["state"].get(0, {}).items():
        if value.dim() > 0:
            optimizer, params = _kept(rule)
            before, saved = snapshot(optimizer, params), _saved(rule)
            saved["state"][0][name] = change(value)
            with pytest.raises(ValueError, match=f"'{name}' of parameter 0 of group 0 .*{words}"):
                optimizer.load_state_dict(saved)
            assert identical(snapshot(optimizer, params), before)


@for_each("rule", RULES)
@for_each("step", [torch.nan, -1.0, torch.inf, 1.5, 10**400])
def test_a_step_that_counts_nothing(rule: Case, step: float):
    if "step" in _saved(rule)["state"].get(0, {}):
        for value in (step, torch.tensor(step)) if isinstance(step, float) else (step,):
            saved = _saved(rule)
            saved["state"][0]["step"] = value
            _refused(rule, saved, "state of parameter 0 of group 0 .*: step must be a step count")


# What a rule knows of a whole tensor; all else is the user's, as in torch.optim.
NUMBERS = {
    "sgd_sai": ["gsnr", "measured"],
    "quad": ["scale", "L_left", "L_right"],
    "procrustes": ["scale", "L_left", "L_right"],
    "hyperball": ["norm"],
}


# A negative `measured` counts gradients that were measured before the first step.
IMPOSSIBLE = [
    (name, entry, value)
    for name, entries in NUMBERS.items()
    for entry in entries
    for value in (torch.nan, torch.inf, -torch.inf, -1.0)
    if (entry, value) != ("measured", -1.0)
]


@for_each(("name", "entry", "value"), IMPOSSIBLE)
def test_a_number_that_no_step_could_have_left(name: str, entry: str, value: float):
    case = Case(name)
    saved = _saved(case)
    saved["state"][0][entry] = torch.full_like(saved["state"][0][entry], value)
    _refused(case, saved, f"state of parameter 0 of group 0 .*: {entry} must be a finite number")


@for_each("rule", RULES)
@for_each("names", [3, "ab", [3, 4], ["a"], ["a", "b", "c"], [["a"], ["b"]], {"a": 1, "b": 2}])
def test_names_that_are_none(rule: Case, names: Any):
    def optimizer() -> tuple[Any, list[torch.Tensor]]:
        params = rule.params(shapes=[(4, 3), (4, 3)])
        return rule.make(list(zip("ab", params, strict=True))), params

    (ours, params), (other, _) = optimizer(), optimizer()
    before, saved = snapshot(ours, params), other.state_dict()
    saved["param_groups"][0]["param_names"] = names
    with pytest.raises(ValueError, match=r"group 0 of the state dict: .*param_names.*; nothing was loaded"):
        ours.load_state_dict(saved)
    assert identical(snapshot(ours, params), before)
    fresh = rule.params(shapes=[(4, 3), (4, 3)])
    with pytest.raises(ValueError, match=r"group 0: .*param_names"):
        rule.make([{"params": fresh, "param_names": names}])
    with pytest.raises(ValueError, match=r"group 1: .*param_names"):
        ours.add_param_group({"params": fresh, "param_names": names})
    assert identical(snapshot(ours, params), before)


@for_each("rule", RULES)
@for_each("views", ["x", [1], 0.5])
def test_views_that_are_none(rule: Case, views: Any):
    if rule.rule.transforms:
        saved = _saved(rule)
        saved["param_groups"][0]["views"] = views
        _refused(rule, saved, "group 0 of the state dict: views must be ")


@for_each("case", CASES)
def test_somebody_else_s_views(case: Case):
    """An unknown key of an element rule's group is nobody's business."""
    if not case.rule.transforms:
        optimizer, params = _optimizer(case)
        optimizer.param_groups[0]["views"] = (1, 2)
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        train(optimizer, params, 1)
        str(optimizer.explain())
