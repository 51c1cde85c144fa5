"""A machine that does to an optimizer what a program may do between two steps, and some that it should not.

Its twin is told the same in the plainest way: dense contiguous gradients, no closure, no thread, no copy, no
plan kept from the last step. Both must be equal to the bit after every action, element rules near their
float64 reference, and a refusal must change nothing.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import signal
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from torch.nn import Parameter

from steepest.rule import find_rule

from . import gradients
from .live_options import INVALID, VALID
from .oracles import Beside, assert_twins, refused
from .profile import machine
from .world import Plan, World, plans

SEEDS = st.integers(0, 10_000)
PLACES = st.integers(0, 3)
BAD_OBJECTS = ["integers", "a string", "expanded", "sparse", "inference", "shared memory"]
BAD_GROUPS = ["again", "overlap", "bad name", "option", "rule", "integers"]


class Training(RuleBasedStateMachine):
    """One run is one case."""

    @initialize(plan=plans())
    def begin(self, plan: Plan) -> None:
        self.world, self.twin = World(plan), World(plan)
        self.beside = Beside(self.world)

    # -- gradients

    @rule(seed=SEEDS, kind=st.sampled_from(gradients.VALUES), form=st.sampled_from(gradients.FORMS))
    def all_gradients(self, seed: int, kind: str, form: str) -> None:
        for at in range(len(self.world.params)):
            self._set_gradient(at, seed + at, kind, form)

    @rule(
        at=PLACES, seed=SEEDS, kind=st.sampled_from(gradients.VALUES), form=st.sampled_from(gradients.FORMS)
    )
    def one_gradient(self, at: int, seed: int, kind: str, form: str) -> None:
        self._set_gradient(at % len(self.world.params), seed, kind, form)

    def _set_gradient(self, at: int, seed: int, kind: str, form: str) -> None:
        param, other = self.world.params[at], self.twin.params[at]
        if not param.requires_grad:
            return
        drawn = gradients.values(kind, param.shape, param.dtype, seed)
        given = gradients.formed(form, drawn)
        param.grad, other.grad = None, None
        param.grad_dtype = other.grad_dtype = None  # any
        param.grad, other.grad = given, drawn.to(given.dtype).clone()

    @rule(at=PLACES)
    def no_gradient(self, at: int) -> None:
        for world in (self.world, self.twin):
            world.params[at % len(world.params)].grad = None

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none: bool) -> None:
        to_none |= any(p.grad is not None and p.grad.is_inference() for p in self.world.params)
        for world in (self.world, self.twin):
            world.optimizer.zero_grad(set_to_none=to_none)

    # -- steps

    @rule()
    def step(self) -> None:
        self._step(self.world.optimizer.step)

    @rule()
    def step_again_and_again(self) -> None:
        """From the third step on, the engine keeps its plan of the last."""
        for _ in range(3):
            self._step(self.world.optimizer.step)

    @rule(seed=SEEDS)
    def step_with_a_closure(self, seed: int) -> None:
        calls = []

        def closure() -> float:
            calls.append(torch.is_grad_enabled())
            self.all_gradients(seed, "finite", "plain")
            return 0.5

        def step() -> None:
            assert self.world.optimizer.step(closure) == 0.5

        self._step(step, before=closure)
        assert all(calls)

    @rule()
    def step_in_a_thread(self) -> None:
        errors: list[BaseException] = []

        def work() -> None:
            try:
                self.world.optimizer.step()
            except BaseException as error:
                errors.append(error)

        def step() -> None:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            for error in errors:
                raise error

        self._step(step)

    @rule(at=st.integers(1, 3))
    def step_while_ctrl_c_is_pressed(self, at: int) -> None:
        """The step is finished first."""
        if threading.current_thread() is not threading.main_thread():
            return
        pressed: list[int] = []
        kinds = {type(find_rule(group["rule"])) for group in self.world.optimizer.param_groups}

        def press() -> None:
            pressed.append(1)
            if len(pressed) == at:
                signal.raise_signal(signal.SIGINT)

        def step() -> None:
            handler = signal.signal(signal.SIGINT, signal.default_int_handler)
            with contextlib.ExitStack() as patches:
                patches.callback(signal.signal, signal.SIGINT, handler)
                for kind in kinds:
                    patches.enter_context(mock.patch.object(kind, "update", _pressing(kind.update, press)))
                try:
                    self.world.optimizer.step()
                except KeyboardInterrupt:
                    assert len(pressed) >= at
                else:
                    assert len(pressed) < at

        self._step(step)

    @rule()
    def step_with_another_default_dtype(self) -> None:
        def step() -> None:
            torch.set_default_dtype(torch.float64)
            try:
                self.world.optimizer.step()
            finally:
                torch.set_default_dtype(torch.float32)

        self._step(step)

    @rule()
    def step_in_inference_mode(self) -> None:
        def step() -> None:
            with torch.inference_mode():
                self.world.optimizer.step()

        self._step(step)

    def _step(self, step: Callable[[], object], before: Callable[[], object] | None = None) -> None:
        if before is not None:
            before()
        skipped = self.world.optimizer.skipped_steps
        words = "infinite or NaN" if self._not_finite("raise") else ""
        message = refused(self.world, step, words)
        if message is not None:
            assert words, f"a step that nothing forbids was refused: {message}"
            return
        self.twin.optimizer._collector.forget(self.twin.optimizer.param_groups)
        if before is not None:
            before()
        self.twin.optimizer.step()
        if self.world.optimizer.skipped_steps == skipped:
            self.beside.step()
        self._check()

    def _not_finite(self, nonfinite: str) -> bool:
        """Whether a gradient is not finite in a group with this option."""
        return any(
            group["nonfinite"] == nonfinite
            and any(p.grad is not None and not _dense(p.grad).isfinite().all() for p in group["params"])
            for group in self.world.optimizer.param_groups
        )

    def _check(self) -> None:
        assert_twins(self.world, self.twin)
        self.beside.check()

    # -- options

    @rule(group=st.integers(0, 1), option=st.sampled_from(sorted(VALID)), data=st.data())
    def change_an_option(self, group: int, option: str, data: Any) -> None:
        group %= len(self.world.optimizer.param_groups)
        if option not in self.world.optimizer.param_groups[group]:
            return
        value = data.draw(VALID[option])
        if option == "weight_decay" and self.world.optimizer.param_groups[group]["rule"] == "hyperball":
            return
        for world in (self.world, self.twin):
            world.optimizer.param_groups[group][option] = value
        if group < len(self.world.plan.groups):
            self.beside.option(group, option, value)

    @rule(group=st.integers(0, 1), option=st.sampled_from(sorted(INVALID)), data=st.data())
    def a_bad_option_is_refused(self, group: int, option: str, data: Any) -> None:
        options = self.world.optimizer.param_groups[group % len(self.world.optimizer.param_groups)]
        own = {*find_rule(options["rule"]).defaults(), "rule", "base_lr", "params", "param_names"}
        if option not in options or option not in own:
            return
        value, good = data.draw(INVALID[option]), options[option]
        if value is Ellipsis:
            del options[option]
        else:
            options[option] = value
        try:
            assert refused(self.world, self.world.optimizer.step, option), f"{option}={value!r} was taken"
        finally:
            options[option] = good

    # -- parameters

    @rule(at=PLACES, on=st.booleans())
    def toggle_requires_grad(self, at: int, on: bool) -> None:
        for world in (self.world, self.twin):
            world.params[at % len(world.params)].requires_grad_(on)

    @rule(at=PLACES, dtype=st.sampled_from([torch.float32, torch.float64]))
    def another_dtype(self, at: int, dtype: torch.dtype) -> None:
        """As ``model.double()`` does it; gradients of the old dtype are dropped."""
        at %= len(self.world.params)
        for world in (self.world, self.twin):
            world.params[at].grad = None
            world.params[at].data = world.params[at].data.to(dtype)
        self.beside.rounded(at)

    @rule(at=PLACES)
    def another_storage(self, at: int) -> None:
        param = self.world.params[at % len(self.world.params)]
        param.data = param.data.clone()

    @rule(at=PLACES, shape=st.sampled_from([(7,), (3, 4), (2, 4, 3), (5, 4, 3), ()]))
    def another_shape_beside_an_old_gradient(self, at: int, shape: tuple[int, ...]) -> None:
        param = self.world.params[at % len(self.world.params)]
        if param.grad is None or shape == param.shape or self._not_finite("skip"):
            return
        before = param.data
        param.data = torch.ones(shape, dtype=param.dtype)
        try:
            assert refused(self.world, self.world.optimizer.step, "parameter")
        finally:
            param.data = before

    @rule(at=PLACES, what=st.sampled_from(["expanded", "inference"]))
    def memory_that_cannot_be_stepped(self, at: int, what: str) -> None:
        param = self.world.params[at % len(self.world.params)]
        if param.grad is None or param.numel() < 2 or self._not_finite("skip"):
            return
        before = param.data
        if what == "expanded":
            param.data = before.flatten()[:1].expand(before.numel()).view(before.shape)
        else:
            with torch.inference_mode():
                other = before.clone()
            param.data = other
        try:
            assert refused(self.world, self.world.optimizer.step, "parameter")
        finally:
            param.data = before

    @rule(at=PLACES)
    def another_object(self, at: int) -> None:
        """As Accelerate replaces parameters, with their state."""
        at %= len(self.world.params)
        for world in (self.world, self.twin):
            old = world.params[at]
            new = Parameter(old.detach().clone(), requires_grad=old.requires_grad)
            new.grad_dtype = None
            new.grad = old.grad
            world.params[at] = new
            for group in world.optimizer.param_groups:
                group["params"] = [new if each is old else each for each in group["params"]]
            if old in world.optimizer.state:
                world.optimizer.state[new] = world.optimizer.state.pop(old)

    @rule(at=PLACES, bad=st.sampled_from(BAD_OBJECTS))
    def a_bad_object_is_refused(self, at: int, bad: str) -> None:
        at %= len(self.world.params)
        old = self.world.params[at]
        new: Any = "weight"
        if bad == "integers":
            new = Parameter(torch.ones(old.shape, dtype=torch.int64), requires_grad=False)
        elif bad == "expanded":
            new = Parameter(torch.ones(1).expand(4, 4))
        elif bad == "sparse":
            new = torch.ones(4, 4).to_sparse()
        elif bad == "inference":
            with torch.inference_mode():
                new = Parameter(torch.ones(old.shape))
        elif bad == "shared memory":
            other = self.world.params[at - 1]
            if other is old or other.numel() == 0:
                return
            new = Parameter(other.data)
        groups = [(group, group["params"]) for group in self.world.optimizer.param_groups]
        for group, params in groups:
            group["params"] = [new if each is old else each for each in params]
        try:
            assert refused(self.world, self.world.optimizer.step, "parameter"), bad
        finally:
            for group, params in groups:
                group["params"] = params

    # -- groups

    @rule(seed=SEEDS, named=st.booleans())
    def add_a_group(self, seed: int, named: bool) -> None:
        def added(world: World) -> None:
            value = gradients.values("finite", torch.Size((4, 3)), torch.float32, seed)
            param = Parameter(value)
            number = len(world.params)
            listed = [(f"p{number}", param)] if named else [param]
            world.optimizer.add_param_group({"params": listed, "rule": "signum", "lr": 0.01})
            world.params.append(param)

        if len(self.world.optimizer.param_groups) > 2:
            return
        if refused(self.world, lambda: added(self.world), "name"):
            assert named != self.world.plan.named
        else:
            added(self.twin)
            self._check()

    @rule(at=PLACES, bad=st.sampled_from(BAD_GROUPS))
    def a_bad_group_is_refused(self, at: int, bad: str) -> None:
        old = self.world.params[at % len(self.world.params)]
        new: dict[str, Any] = {"params": [old]}
        fresh = Parameter(torch.ones(4, 3))
        if bad == "overlap":
            if old.numel() == 0:
                return
            new = {"params": [Parameter(old.data)]}
        elif bad == "bad name":
            new = {"params": [(3, fresh)]}
        elif bad == "option":
            new = {"params": [fresh], "lr": -1.0}
        elif bad == "rule":
            new = {"params": [fresh], "rule": "lionn"}
        elif bad == "integers":
            new = {"params": [torch.ones(3, dtype=torch.int32)]}
        assert refused(self.world, lambda: self.world.optimizer.add_param_group(new)), bad

    # -- copies

    @rule(how=st.sampled_from(["deepcopy", "pickle", "torch.save"]))
    def go_on_with_a_copy(self, how: str) -> None:
        world = self.world
        both = (world.optimizer, world.params)
        if how == "deepcopy":
            new = copy.deepcopy(both)
        elif how == "pickle":
            new = pickle.loads(pickle.dumps(both))
        else:
            file = io.BytesIO()
            torch.save(both, file)
            file.seek(0)
            new = torch.load(file, weights_only=False)
        for old, param in zip(world.params, new[1], strict=True):
            param.grad = None
            param.grad_dtype = None
            param.grad = old.grad
        world.optimizer, world.params = new
        self._check()

    @rule(through_a_file=st.booleans())
    def load_its_own_state_dict(self, through_a_file: bool) -> None:
        saved = self.world.optimizer.state_dict()
        if through_a_file and not _has_functions(saved):
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        self.world.optimizer.load_state_dict(saved)
        self._check()

    def teardown(self) -> None:
        torch.set_default_dtype(torch.float32)


def _pressing(update: Callable[..., Any], press: Callable[[], None]) -> Callable[..., Any]:
    def pressing(*args: Any, **given: Any) -> Any:
        press()
        return update(*args, **given)

    return pressing


def _has_functions(saved: dict[str, Any]) -> bool:
    return any(callable(value) for group in saved["param_groups"] for value in group.values())


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_dense() if gradient.layout is not torch.strided else gradient


TestTraining = Training.TestCase
TestTraining.settings = machine(0.5, few=150, steps=15)
