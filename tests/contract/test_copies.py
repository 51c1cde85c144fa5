"""Copies, pickles and old pickles step on: everything lives in defaults, param_groups and state."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import steepest
from loops import for_each

from .cases import CASES, RULES, Case, by_id, reach, spread
from .training import identical, snapshot, steps

# Not the default of any option: whatever is kept on the optimizer alone is lost on the way.
UNUSUAL: dict[str, Any] = {
    "weight_decay": 0.125,
    "state_dtype": torch.float64,
    "rounding": "stochastic",
    "nonfinite": "skip",
    "maximize": True,
    "compile": False,
    "seed": 11,
}


def _params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _by_torch_save(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _by_getstate(optimizer: Any) -> Any:
    made = type(optimizer).__new__(type(optimizer))
    made.__setstate__(copy.deepcopy(optimizer.__getstate__()))
    return made


COPIERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "torch.save": _by_torch_save,
    "getstate": _by_getstate,
}


@for_each(("case", "copier"), spread(CASES, COPIERS))
def test_a_copy_steps_on_as_the_original_does(case: Case, copier: str):
    params = case.params(torch.bfloat16)
    optimizer = case.make(params, **UNUSUAL)
    steps(optimizer, params, range(3))
    other = COPIERS[copier](optimizer)
    assert type(other) is type(optimizer)
    assert identical(snapshot(other, _params(other)), snapshot(optimizer, params))
    steps(optimizer, params, range(3, 6))
    assert not identical(_params(other), params)
    steps(other, _params(other), range(3, 6))
    assert identical(snapshot(other, _params(other)), snapshot(optimizer, params))


@for_each(("rule", "copier"), spread(RULES, COPIERS, alike=reach))
def test_a_copy_made_before_the_first_step(rule: Case, copier: str):
    params = rule.params()
    optimizer = rule.make(params, **UNUSUAL)
    other = COPIERS[copier](optimizer)
    steps(optimizer, params, range(3))
    steps(other, _params(other), range(3))
    assert identical(_params(other), params)


@for_each("rule", RULES)
def test_a_copy_with_several_rules(rule: Case):
    params = rule.params()
    groups = [{"params": params[:1]}, {"params": params[1:], "rule": "lion", "lr": 0.5}]
    optimizer = steepest.Optimizer(groups, rule=rule.name, lr=0.25)
    steps(optimizer, params, range(2))
    other = pickle.loads(pickle.dumps(optimizer))
    steps(optimizer, params, range(2, 4))
    steps(other, _params(other), range(2, 4))
    assert identical(_params(other), params)


@for_each("case", CASES)
def test_a_copy_s_added_group_gets_the_options(case: Case):
    optimizer = copy.deepcopy(case.make(case.params(), **UNUSUAL))
    optimizer.add_param_group({"params": case.params()})
    group = optimizer.param_groups[1]
    unusual = case.can(**UNUSUAL)
    assert {name: group[name] for name in unusual} == unusual


@pytest.mark.parametrize("gone", ["each option alone", "all options", "the rule too"])
@pytest.mark.parametrize("rule", RULES, ids=by_id)
def test_an_older_pickle_that_lacks_options_steps_on_with_the_defaults(rule: Case, gone: str):
    params, twins = rule.params(), rule.params()
    known = [name for name in rule.rule.defaults() if name != "lr"] + ["skipped_steps", "base_lr"]
    # What all rules have in common is looked up in one place, so one rule lacks each of it alone.
    own = known if rule is RULES[0] else [name for name in known if name in rule.rule.hyper]
    missing = {
        "each option alone": [[name] for name in own],
        "all options": [known],
        "the rule too": [[*known, "rule"]],
    }[gone]
    expected = rule.make(twins)
    steps(expected, twins, range(4))
    for names in missing:
        params = rule.params()
        optimizer = rule.make(params)
        steps(optimizer, params, range(2))
        state = copy.deepcopy(optimizer.__getstate__())
        for table in (state["defaults"], *state["param_groups"]):
            for name in names:
                table.pop(name, None)
        older = type(optimizer).__new__(type(optimizer))
        older.__setstate__(state)
        steps(older, _params(older), range(2, 4))
        assert identical(_params(older), twins), names
        older.add_param_group({"params": rule.params()})
        older.load_state_dict(older.state_dict())
        assert older.skipped_steps == 0


@for_each("rule", RULES)
def test_a_copy_has_hooks_that_fire_once(rule: Case):
    params = rule.params()
    other = pickle.loads(pickle.dumps(rule.make(params)))
    calls = []
    other.register_step_pre_hook(lambda *_: calls.append("pre"))
    other.register_step_post_hook(lambda *_: calls.append("post"))
    steps(other, _params(other), range(1))
    assert calls == ["pre", "post"]
