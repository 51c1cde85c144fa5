"""Constructors are signatures: what they show, what they bind, and how users build on them."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import steepest
from loops import for_each
from steepest.constructor import constructor
from steepest.hyperparameters import learning_rate
from steepest.registry import optimizer_class
from steepest.rule import find_rule
from steepest.rules import LionRule, MuonRule, ScionRule

OPTIMIZERS = [optimizer_class(name) for name in steepest.list_optimizers()]


def weight() -> Parameter:
    return Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))


@pytest.fixture
def _no_new_rules() -> Iterator[None]:
    """Forget the rules that a test adds."""
    rules, classes = dict(steepest.rule._RULES), dict(steepest.optimizer.OPTIMIZERS)
    yield
    for known, before in ((steepest.rule._RULES, rules), (steepest.optimizer.OPTIMIZERS, classes)):
        known.clear()
        known.update(before)


@pytest.mark.filterwarnings("ignore:.*the momentum is used as it is:UserWarning")
@pytest.mark.parametrize("cls", [*OPTIMIZERS, steepest.compat.ScaledOptum, steepest.compat.SGD_sai])
def test_the_signature_shows_every_option_with_its_default(cls: type[steepest.Optimizer]):
    parameters = inspect.signature(cls).parameters
    hidden = [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    # It takes options of the user's own; no other class hides what it takes.
    assert len(hidden) == (cls is steepest.OrthogonalizedOptimizer)
    shown = {name: p.default for name, p in parameters.items() if p not in hidden and name != "params"}
    group = cls([weight()], **shown).param_groups[0]
    assert set(cls.rule.defaults()) <= set(shown)
    assert {name: group[name] for name in cls.rule.defaults()} == {
        name: shown[name] for name in cls.rule.defaults()
    }


@for_each("cls", OPTIMIZERS)
def test_every_option_shows_its_type(cls: type[steepest.Optimizer]):
    for name, parameter in inspect.signature(cls).parameters.items():
        assert parameter.annotation is not parameter.empty, name


def test_arguments_that_do_not_fit_are_type_errors_of_the_class():
    with pytest.raises(TypeError, match=r"Lion\(\) missing a required argument: 'params'"):
        steepest.Lion()
    with pytest.raises(TypeError, match=r"Lion\(\) too many positional arguments"):
        steepest.Lion([weight()], 0.1, (0.9, 0.99), 0.0, "l2")
    with pytest.raises(TypeError, match=r"Lion\(\) multiple values for argument 'lr'"):
        steepest.Lion([weight()], 0.1, lr=0.1)
    with pytest.raises(TypeError, match="rule"):
        steepest.Lion([weight()], rule="sgd")


class Halved(steepest.Lion):
    """A user's class with a constructor of its own."""

    def __init__(self, params: Any, lr: float, *, flavour: str = "sweet", **options: Any) -> None:
        super().__init__(params, lr / 2, **options)
        self.flavour = flavour


class Slow(steepest.Scion):
    """A user's class with other defaults."""

    @constructor
    def __init__(self, params: Any, lr: float = 1e-5, radius: float = 3.0, **options: Any) -> None: ...


def test_a_subclass_may_have_a_constructor_of_its_own():
    optimizer = Halved([weight()], 0.5, flavour="sour", betas=(0.5, 0.5))
    for twin in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (twin.param_groups[0]["lr"], twin.param_groups[0]["betas"]) == (0.25, (0.5, 0.5))
        assert twin.defaults.items() >= optimizer.defaults.items()
    assert list(inspect.signature(Halved).parameters) == ["params", "lr", "flavour", "options"]
    with pytest.raises(TypeError, match=r"Halved\(\) got an unexpected keyword argument 'beta'.*'betas'"):
        Halved([weight()], 0.5, beta=(0.5, 0.5))


def test_a_subclass_may_declare_other_defaults_and_inherits_the_rest():
    group = Slow([weight()]).param_groups[0]
    assert (group["lr"], group["radius"], group["scale"], group["momentum"]) == (
        *(1e-5, 3.0),
        *("unit_rms_norm", 0.9),
    )
    assert Slow([weight()], 0.5, 2.0).param_groups[0]["radius"] == 2.0
    shown = inspect.signature(Slow).parameters
    assert (shown["lr"].default, shown["weight_decay"].default, shown["nesterov"].default) == (
        1e-5,
        1.0,
        False,
    )
    # A group that names the rule has the rule's.
    other = steepest.Lion([{"params": [weight()], "rule": "scion"}]).param_groups[0]
    assert (other["lr"], other["radius"]) == (1e-3, 50.0)


@pytest.mark.usefixtures("_no_new_rules")
def test_a_subclass_with_a_rule_of_its_own_takes_the_defaults_of_the_nearest_signature():
    class Rule(MuonRule):
        name = "constructor_test"

    class Mine(steepest.Muon, rule=Rule(), defaults={"ns_steps": 7}):
        """Muon with another rule."""

    group = Mine([weight()]).param_groups[0]
    assert (group["rule"], group["ns_steps"], group["lr"]) == ("constructor_test", 7, 1e-3)
    assert inspect.signature(Mine).parameters["ns_steps"].default == 7
    assert inspect.signature(steepest.Muon).parameters["ns_steps"].default is None
    assert find_rule("muon").defaults()["ns_steps"] is None


@pytest.mark.usefixtures("_no_new_rules")
def test_a_hyperparameter_without_a_default_is_refused_with_the_class():
    class Rule(LionRule):
        name = "constructor_test"
        hyper = LionRule.hyper | {"warmth": learning_rate()}

    with pytest.raises(TypeError, match=r"Mine.__init__ has no default for warmth"):

        class Mine(steepest.Lion, rule=Rule()):
            """A class that forgot one."""

    assert "constructor_test" not in steepest.list_optimizers()


@pytest.mark.usefixtures("_no_new_rules")
def test_changed_defaults_are_the_rule_s_options():
    class Rule(ScionRule):
        name = "constructor_test"

    with pytest.raises(TypeError, match=r"'constructor_test' has no option raduis \(did you mean 'radius'"):

        class Mine(steepest.Scion, rule=Rule(), defaults={"raduis": 1.0}):
            """A class with a typo."""
