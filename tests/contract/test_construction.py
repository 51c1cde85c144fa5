"""Construction: what ``params`` may be, unknown keywords, parameters that cannot be optimized."""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch.nn import Linear, Parameter, Sequential

import steepest
from loops import for_each
from steepest.hyperparameters import COMMON_OPTIONS

from .cases import LR, Case, deterministic
from .training import identical, make_params, train


def test_a_bare_tensor_is_a_type_error(rule: Case):
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
        rule.make(rule.ones(2))


@for_each("model", [Linear(2, 2), Sequential(Linear(2, 2))])
def test_a_model_is_a_type_error_that_says_what_to_pass(rule: Case, model: torch.nn.Module):
    with pytest.raises(TypeError, match=r"got the model .*model.parameters\(\).*steepest.build\(model"):
        rule.make(model)


def test_an_empty_list_is_a_value_error(rule: Case):
    with pytest.raises(ValueError, match="empty parameter list"):
        rule.make([])


def test_an_empty_generator_is_a_value_error(rule: Case):
    with pytest.raises(ValueError, match="empty parameter list"):
        rule.make(iter(()))


def test_something_else_than_tensors_is_a_type_error(rule: Case):
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        rule.make([rule.ones(2), 3.0])


def test_a_set_is_a_type_error(rule: Case):
    with pytest.raises(TypeError, match="ordered collections"):
        rule.make([{"params": {rule.ones(2)}}])


def test_a_non_leaf_is_a_value_error(rule: Case):
    with pytest.raises(ValueError, match="non-leaf"):
        rule.make([rule.ones(2) * 2])


def test_a_parameter_twice_in_a_group_warns_and_is_stepped_once(rule: Case):
    twice, once = (rule.ones(3) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = rule.make([twice, twice])
    train(optimizer, [twice])
    train(rule.make([once]), [once])
    assert identical([twice], [once])


def test_a_parameter_in_two_groups_is_a_value_error(rule: Case):
    param = rule.ones(2)
    with pytest.raises(ValueError, match="more than one parameter group"):
        rule.make([{"params": param}, {"params": param}])


def test_every_form_of_params_makes_the_same_optimizer(rule: Case):
    def forms(params: list[Parameter]):
        names = [f"layer.{index}" for index in range(len(params))]
        return {
            "list": params,
            "tuple": tuple(params),
            "generator": (p for p in params),
            "dict values": OrderedDict(zip(names, params, strict=True)).values(),
            "pairs": list(zip(names, params, strict=True)),
            "pair generator": zip(names, params, strict=True),
            "one group": [{"params": params}],
            "group of a generator": [{"params": (p for p in params)}],
            "group of pairs": [{"params": zip(names, params, strict=True)}],
            "group of a tensor each": [{"params": p} for p in params],
        }

    def ends(form: str) -> list[Any]:
        params = rule.params()
        return train(rule.make(forms(params)[form]), params)

    # Noise is keyed by names if there are any.
    for form in forms(rule.params()):
        assert identical(ends(form), ends("pairs" if "pair" in form else "list")), form
    assert not deterministic(rule) or identical(ends("pairs"), ends("list"))


def test_names_are_kept_in_the_group_and_its_checkpoint(rule: Case):
    layers = Sequential(Linear(2, 2, bias=False), Linear(2, 3, bias=False))
    optimizer = rule.make(layers.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "1.weight"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "1.weight"]


def test_names_must_be_given_for_all_or_none(rule: Case):
    with pytest.raises(ValueError, match="Some param names are missing"):
        rule.make([("weight", rule.ones(2)), rule.ones(2)])


def test_named_and_nameless_groups_do_not_mix(rule: Case):
    named, nameless = [("weight", rule.ones(2))], [rule.ones(2)]
    with pytest.raises(ValueError, match="group 1: its parameters have names"):
        rule.make([{"params": nameless}, {"params": named}])


def test_an_unknown_keyword_is_a_type_error_with_a_near_miss(rule: Case):
    if "unknown keywords" in rule.cannot:
        return
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'weight_decai'.*'weight_decay'"):
        rule.make(rule.params(), weight_decai=0.1)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'foreach'"):
        rule.make(rule.params(), foreach=True)


def test_an_unknown_keyword_of_the_general_class_is_a_type_error(rule: Case):
    with pytest.raises(TypeError, match=r"'roundin' .*'rounding'|'roundin'.*'rounding'"):
        steepest.Optimizer(rule.params(), rule=rule.name, roundin="stochastic")


def test_an_unknown_rule_is_a_value_error_with_a_near_miss():
    with pytest.raises(ValueError, match=r"'lyon'.*'lion'"):
        steepest.create("lyon", make_params())
    with pytest.raises(ValueError, match=r"'lyon'.*'lion'"):
        steepest.Optimizer(make_params(), rule="lyon")


def test_common_options_are_keyword_only(rule: Case):
    signature = inspect.signature(type(rule.make(rule.params())))
    positional = {
        name for name, p in signature.parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    }
    assert positional.isdisjoint(COMMON_OPTIONS)


def test_the_constructor_has_the_rule_s_hyper_parameters_and_defaults(rule: Case):
    optimizer = steepest.create(rule.name, rule.params())
    signature = inspect.signature(type(optimizer)).parameters
    for name, default in steepest.rule.find_rule(rule.name).defaults().items():
        assert optimizer.defaults[name] == default, name
        assert signature[name].default == default, name


def test_the_general_class_is_the_constructor(rule: Case):
    expected = train(rule.make(params := rule.params()), params)
    params = rule.params()
    optimizer = steepest.Optimizer(params, rule=rule.name, lr=LR)
    assert identical(train(optimizer, params), expected)


@for_each("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_a_dtype_that_cannot_be_optimized_is_refused_by_name(rule: Case, dtype: torch.dtype):
    bad = torch.zeros(2, 2).to(dtype)
    with pytest.raises(ValueError, match=rf"'codebook' has dtype {dtype}"):
        rule.make([("weight", rule.ones(2)), ("codebook", bad)])
    with pytest.raises(ValueError, match=rf"parameter 1 of group 0 has dtype {dtype}"):
        rule.make([rule.ones(2), bad])


def test_sparse_storage_is_refused_by_name(rule: Case):
    bad = Parameter(torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match=r"'table' has layout torch.sparse_coo"):
        rule.make([("table", bad)])


def test_construction_touches_neither_parameters_nor_the_generator(rule: Case):
    params, before = rule.params(), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = rule.make(params)
    assert identical(params, rule.params())
    assert torch.equal(torch.get_rng_state(), before)
    assert optimizer.state_bytes() == 0
    assert not optimizer.state


def test_defaults_name_what_cyclic_schedulers_look_for(rule: Case):
    optimizer = rule.make(rule.params())
    assert ("betas" in rule.rule.hyper) == ("betas" in optimizer.defaults)
    assert {"betas", "momentum"} & optimizer.defaults.keys()
    for name in ("momentum", "betas"):
        assert (name in rule.rule.hyper) == (name in optimizer.param_groups[0])


def test_repr_shows_the_options(rule: Case):
    text = repr(rule.make(rule.params(), maximize=True))
    assert f"lr: {LR}" in text
    assert "maximize: True" in text
