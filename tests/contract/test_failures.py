"""A step that fails leaves everything as it was, and no step ever touches a global generator."""

from __future__ import annotations

import inspect
import random
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from loops import for_each
from steepest.rule import StateSpec

from .cases import CASES, LOW_BIT, Case, by_id, spread
from .training import identical, set_gradients, snapshot, steps, train, values


def _cannot(self: Any, *_: Any, **__: Any) -> Any:
    raise RuntimeError("cannot")


def _has_state(case: Case) -> bool:
    params = case.params()[:1]
    return bool(case.rule.state_specs(case.make(params).param_groups[0]))


@pytest.mark.parametrize("trained", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("case", [case for case in CASES if _has_state(case)], ids=by_id)
def test_no_memory_for_the_last_parameter_s_state(case: Case, trained: bool, monkeypatch: pytest.MonkeyPatch):
    """The state of all parameters is made before any parameter moves, and kept only if all could be made."""
    params = case.params()
    optimizer = case.make(params, weight_decay=0.125)
    if trained:
        steps(optimizer, params[:1], range(2))
    before = snapshot(optimizer, params)
    original = StateSpec.make

    def make(self: StateSpec, param: Tensor, state_dtype: Any = None) -> Any:
        if param.shape == params[2].shape:
            raise torch.OutOfMemoryError("no memory")
        return original(self, param, state_dtype)

    monkeypatch.setattr(StateSpec, "make", make)
    set_gradients(params, 0)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert identical(snapshot(optimizer, params), before)


@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_a_rule_that_fails_at_once_leaves_everything(case: Case, monkeypatch: pytest.MonkeyPatch):
    params, twins = case.params(), case.params()
    optimizer, twin = case.make(params, weight_decay=0.125), case.make(twins, weight_decay=0.125)
    train(optimizer, params, 2)
    before = snapshot(optimizer, params)

    set_gradients(params, 2)
    with monkeypatch.context() as patch:
        patch.setattr(type(case.rule), "update", _cannot)
        with pytest.raises(RuntimeError, match="cannot"):
            optimizer.step()
    assert identical(snapshot(optimizer, params), before)
    steps(optimizer, params, range(2, 4))
    assert identical(params, train(twin, twins, 4))


def test_a_rule_that_fails_in_its_first_measurement_is_not_poisoned(
    rule: Case, monkeypatch: pytest.MonkeyPatch
):
    """What is measured once must be measured by the step that is taken."""
    params, twins = rule.params(), rule.params()
    optimizer, twin = rule.make(params), rule.make(twins)
    set_gradients(params, 50)
    with monkeypatch.context() as patch:
        patch.setattr(type(rule.rule), "update", _cannot)
        with pytest.raises(RuntimeError, match="cannot"):
            optimizer.step()
    assert identical(train(optimizer, params), train(twin, twins))


def _interrupting(case: Case, monkeypatch: pytest.MonkeyPatch, at: int, times: int = 1) -> None:
    """Let Ctrl-C be pressed in the middle of a step: in this call of the rule's update."""
    original, calls = type(case.rule).update, []

    def update(self: Any, *args: Any, **given: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return original(self, *args, **given)

    update.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(case.rule), "update", update)


@pytest.fixture
def default_handler() -> Iterator[None]:
    """Python's own, which is not there in a process that was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


@pytest.mark.usefixtures("default_handler")
@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupted_step_is_finished_first(case: Case, at: int, monkeypatch: pytest.MonkeyPatch):
    dtypes = [torch.float32, torch.float64]  # which take a call of update each
    params, twins = ([case.params(dtype)[0] for dtype in dtypes] for _ in range(2))
    optimizer, twin = case.make(params, compile=False), case.make(twins, compile=False)
    train(optimizer, params, 2)
    set_gradients(params, 2)
    with monkeypatch.context() as patch:
        _interrupting(case, patch, at)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    train(twin, twins, 3)
    assert identical(params, twins)
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])


@pytest.mark.usefixtures("default_handler")
def test_a_second_interrupt_is_not_held(monkeypatch: pytest.MonkeyPatch):
    case = Case("lion")
    params = case.params()
    optimizer, before = case.make(params), values(params)
    set_gradients(params, 0)
    _interrupting(case, monkeypatch, 1, times=2)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert identical(params, before)


def test_a_program_s_own_handler_is_called_at_once(monkeypatch: pytest.MonkeyPatch):
    case, seen = Case("lion"), []
    params = case.params()
    optimizer, before = case.make(params), values(params)
    set_gradients(params, 0)
    _interrupting(case, monkeypatch, 1)
    previous = signal.signal(signal.SIGINT, lambda *_: seen.append(identical(values(params), before)))
    try:
        optimizer.step()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert seen == [True]


@for_each("case", CASES)
def test_a_pre_hook_that_raises(case: Case):
    params = case.params()
    optimizer = case.make(params)
    train(optimizer, params, 2)
    before = snapshot(optimizer, params)

    def hook(*_: Any) -> None:
        raise KeyError("hook")

    optimizer.register_step_pre_hook(hook)
    with pytest.raises(KeyError):
        optimizer.step()
    assert identical(snapshot(optimizer, params), before)


@for_each(("case", "dtype"), [*spread(CASES, [torch.float32, torch.bfloat16]), *LOW_BIT])
def test_the_global_generators_are_never_touched(case: Case, dtype: torch.dtype):
    torch.manual_seed(5)
    random.seed(5)
    before, python_before = torch.get_rng_state(), random.getstate()
    params = case.params(dtype)
    optimizer = case.make(params, rounding="stochastic", nonfinite="skip")
    train(optimizer, params, 3)
    optimizer.load_state_dict(optimizer.state_dict())
    params[0].grad.fill_(torch.nan)
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_before


@pytest.mark.usefixtures("default_handler")
def test_ctrl_c_is_not_lost_in_a_step_that_raises(monkeypatch: pytest.MonkeyPatch):
    case = Case("signgsd")
    params = case.params()
    optimizer = case.make(params)
    set_gradients(params, 0)

    def update(*_: Any, **given: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(case.rule), "update", update)
    with pytest.raises(KeyboardInterrupt) as raised:
        optimizer.step()
    assert str(raised.value.__cause__) == "out of memory"
