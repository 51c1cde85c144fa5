"""Hooks fire once, in torch's order, and may replace what the step is called with."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import steepest
from loops import for_each

from .cases import CASES, RULES, Case
from .training import identical, set_gradients, steps, train


def _hooked(optimizer: torch.optim.Optimizer, calls: list[str]) -> ExitStack:
    def note(word: str) -> Any:
        return lambda opt, args, kwargs: calls.append(word)

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre 1")),
        optimizer.register_step_pre_hook(note("pre 2")),
        optimizer.register_step_post_hook(note("post 1")),
        optimizer.register_step_post_hook(note("post 2")),
    ]
    stack = ExitStack()
    for handle in handles:
        stack.callback(handle.remove)
    return stack


def _calls_in_one_step(optimizer: torch.optim.Optimizer, params: list[Any]) -> list[str]:
    calls: list[str] = []
    with _hooked(optimizer, calls):
        set_gradients(params, 0)
        optimizer.step(lambda: calls.append("closure"))
        after = list(calls)
    optimizer.step()
    assert calls == after, "removed hooks must not fire"
    return calls


@for_each("rule", RULES)
def test_step_hooks_fire_once_in_torch_s_order(rule: Case):
    ours = _calls_in_one_step(rule.make(params := rule.params()), params)
    theirs = _calls_in_one_step(torch.optim.SGD(params := rule.params()), params)
    assert ours == theirs
    assert ours == ["global pre", "pre 1", "pre 2", "closure", "post 1", "post 2", "global post"]


@for_each("rule", RULES)
def test_hooks_fire_once_whichever_class_was_made_first(rule: Case):
    expected = ["pre 1", "closure", "post 1"]
    kind = type(rule.make(rule.params()))
    derived = type("Derived", (kind,), {})
    makers = (
        lambda params: steepest.Optimizer(params, rule=rule.name),
        lambda params: derived(params),
        lambda params: kind(params),
        lambda params: derived(params),
    )
    for make in makers:
        params = rule.params()
        calls = _calls_in_one_step(make(params), params)
        assert [call for call in calls if call in expected] == expected


@for_each("rule", RULES)
def test_a_pre_hook_may_replace_the_closure(rule: Case):
    optimizer = rule.make(rule.params())
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 2.0), {}))
    assert optimizer.step(lambda: 1.0) == 2.0


@for_each("rule", RULES)
def test_a_pre_hook_that_returns_something_else_is_an_error(rule: Case):
    optimizer = rule.make(rule.params())
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: 3)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


@for_each("case", CASES)
def test_a_pre_hook_may_change_gradients_and_options(case: Case):
    params, twins = case.params(), case.params()
    optimizer, twin = case.make(params), case.make(twins, lr=0.5)

    def scale(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in opt.param_groups:
            group["lr"] = 0.5
            for param in group["params"]:
                param.grad.mul_(2)

    optimizer.register_step_pre_hook(scale)
    steps(optimizer, params, [0])
    set_gradients(twins, 0)
    for param in twins:
        param.grad.mul_(2)
    twin.step()
    assert identical(params, twins)


@for_each("rule", RULES)
def test_state_dict_hooks_fire_and_may_replace_the_dict(rule: Case):
    params = rule.params()
    optimizer = rule.make(params)
    train(optimizer, params)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "extra": 1})
    saved = optimizer.state_dict()
    assert saved.pop("extra") == 1
    again = rule.make(rule.params())
    again.register_load_state_dict_pre_hook(
        lambda opt, loaded: {k: v for k, v in loaded.items() if k != "junk"}
    )
    again.register_load_state_dict_post_hook(lambda opt: seen.append(opt.state_dict()))
    again.load_state_dict({**saved, "junk": 1})
    assert seen[0] == "save pre"
    assert identical(seen[1], saved), "a post-hook finds the state as it will stay"
    assert identical(again.state_dict(), saved)


@for_each("rule", RULES)
def test_a_load_pre_hook_s_dict_is_the_one_checked_and_loaded(rule: Case):
    params = rule.params()
    optimizer = rule.make(params)
    train(optimizer, params)
    good = optimizer.state_dict()
    again = rule.make(rule.params())
    again.register_load_state_dict_pre_hook(lambda opt, loaded: good)
    again.load_state_dict({"state": {}, "param_groups": []})
    assert identical(again.state_dict(), good)


@for_each("rule", RULES)
def test_loading_leaves_no_hook_behind(rule: Case):
    optimizer = rule.make(rule.params())
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


@for_each("rule", RULES)
def test_the_profiler_names_the_step_after_the_class(rule: Case):
    params = rule.params()
    optimizer = rule.make(params)
    with torch.autograd.profiler.profile() as profile:
        steps(optimizer, params, [0])
    names = {event.name for event in profile.function_events}
    assert f"Optimizer.step#{type(optimizer).__name__}.step" in names
