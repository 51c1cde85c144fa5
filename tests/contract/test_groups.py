"""Param groups: options of their own, keys of other people, groups added after steps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

import steepest
from loops import for_each
from steepest.rule import find_rule

from .cases import CASES, RULES, Case, by_id, deterministic, reach, related, spread
from .training import identical, set_gradients, snapshot, steps, train, values

# What a tensor does must not depend on its group's neighbours; "max" relates all tensors by design.
ALONE = [case for case in CASES if deterministic(case) and not related(case)]


@for_each("rule", RULES)
def test_unknown_keys_in_a_group_are_kept_through_a_checkpoint(rule: Case):
    theirs = {"name": "decoder", "lr_scale": 0.5, "initial_lr": 3.0, "depth_of_layer": 1}
    params = rule.params()
    optimizer = rule.make([{"params": params, **theirs}])
    train(optimizer, params)
    again = rule.make(rule.params())
    again.load_state_dict(optimizer.state_dict())
    for group in (
        optimizer.param_groups[0],
        optimizer.state_dict()["param_groups"][0],
        again.param_groups[0],
    ):
        assert {name: group[name] for name in theirs} == theirs


SCHEDULERS_KEYS = {
    "initial_lr": 0.5,
    "max_lr": 0.5,
    "min_lr": 0.1,
    "swa_lr": 0.1,
    "lr_scale": 0.5,
    "lr_mult": 0.5,
    "wd_mult": 0.5,
    "max_momentum": 0.9,
    "base_momentum": 0.8,
    "warmup_steps": 3,
}


@for_each("rule", RULES)
def test_keys_of_schedulers_and_frameworks_are_no_typos(rule: Case):
    optimizer = rule.make([{"params": rule.params(), **SCHEDULERS_KEYS}])
    assert SCHEDULERS_KEYS.items() <= optimizer.param_groups[0].items()


@for_each("rule", RULES)
def test_a_misspelt_option_of_a_group_is_refused(rule: Case):
    known = find_rule(rule.make(rule.params()).defaults["rule"]).defaults()
    options = sorted(name for name in known if len(name) > 5 and name.isalpha())
    for name in options:
        with pytest.raises(TypeError, match=f"group 0: .*did you mean '{name}'"):
            rule.make([{"params": rule.params(), name[:-1] + "q": 0.5}])


@pytest.mark.parametrize(
    ("own", "main", "options"),
    [
        ("muon", "muon", {"betas": (0.9, 0.9)}),
        ("adamw", "muon", {"momentum": 0.9}),
        ("muon", "adamw", {"betas": (0.9, 0.9)}),
        ("signgsd", "signgsd", {"momentum": 0.9}),
        ("lion", "muon", {"ns_steps": 5}),
    ],
)
def test_an_option_of_another_rule_is_refused_before_anything_changes(own: str, main: str, options: dict):
    first, second = (Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = steepest.Optimizer([first], rule=main)
    group = {"params": [second], "rule": own, **options}
    name = next(iter(options))
    with pytest.raises(TypeError, match=f"Optimizer, group 1: {name!r} is no option of {own!r}, but of "):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    assert group.keys() == {"params", "rule", *options}


def test_groups_of_an_optimizer_may_make_another():
    """Such groups may hold betas, which schedulers read in every group."""
    params = [Parameter(torch.ones(2, 2)) for _ in range(2)]
    mixed = steepest.Optimizer([{"params": params[:1]}, {"params": params[1:], "rule": "muon"}], rule="adamw")
    again = steepest.Optimizer(mixed.param_groups, rule="muon")
    assert [group["rule"] for group in again.param_groups] == ["adamw", "muon"]


@for_each("case", CASES)
def test_unknown_keys_change_nothing(case: Case):
    expected = train(case.make(params := case.params()), params)
    params = case.params()
    optimizer = case.make([{"params": params, "name": "decoder", "foreach": True, "capturable": True}])
    assert identical(train(optimizer, params), expected)


@for_each("case", CASES)
def test_a_group_s_options_act_as_the_optimizer_s_do(case: Case):
    options = case.can(lr=0.25, weight_decay=0.125, maximize=True, nonfinite="skip")
    expected = train(case.make(params := case.params(), **options), params)
    params = case.params()
    optimizer = case.make([{"params": params, **options}], **{**options, "lr": 7.0, "maximize": False})
    assert identical(train(optimizer, params), expected)


@for_each("case", ALONE)
def test_groups_do_not_mix(case: Case):
    options = [{"lr": 0.5}, case.can(weight_decay=0.25), {"maximize": True}]
    params, twins = case.params(), case.params()
    together = case.make([{"params": [p], **own} for p, own in zip(params, options, strict=True)])
    apart = [case.make([p], **own) for p, own in zip(twins, options, strict=True)]
    for step in range(3):
        steps(together, params, [step])
        set_gradients(twins, step)
        for optimizer in apart:
            optimizer.step()
    assert identical(params, twins)


@pytest.mark.parametrize("case", [case for case in CASES if not case.options.get("literal")], ids=by_id)
def test_how_parameters_are_grouped_does_not_matter(case: Case):
    """Noise and relations among tensors go by the place in the optimizer, not in the group.

    PSGD's original, that ``literal`` follows, relates the tensors of a group.
    """
    options = {"rounding": "stochastic", "weight_decay": 0.125}
    shapes = [(8, 4), (8, 4), (5,), ()]
    expected = None
    for cuts in ([4], [1, 2, 1], [1, 1, 1, 1], [2, 2]):
        params = case.params(torch.bfloat16, shapes=shapes)
        rest = iter(params)
        groups = [{"params": [next(rest) for _ in range(count)]} for count in cuts]
        result = train(case.make(groups, **options), params)
        expected = expected or result
        assert identical(result, expected), cuts


@for_each("case", ALONE)
def test_a_group_added_after_steps_starts_as_if_new(case: Case):
    params, twins = case.params(), case.params()
    optimizer, early, late = case.make(params[:2]), case.make(twins[:2]), case.make(twins[2:], lr=0.5)
    for step in range(4):
        set_gradients(params, step)
        set_gradients(twins, step)
        if step == 2:
            optimizer.add_param_group({"params": params[2:], "lr": 0.5})
        optimizer.step()
        early.step()
        if step >= 2:
            late.step()
    assert identical(params, twins)


@for_each("case", CASES)
def test_an_added_group_gets_the_optimizer_s_options(case: Case):
    optimizer = case.make([case.ones(2)], weight_decay=0.25, rounding="stochastic", seed=5)
    optimizer.add_param_group({"params": case.ones(2), "seed": 6})
    first, second = ({k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups)
    assert second == {**first, "seed": 6}


def _like(params: list[Parameter]) -> Parameter:
    return Parameter(torch.ones_like(params[0]))


ERRORS = {
    "a parameter of another group": (
        ValueError,
        "more than one parameter group",
        lambda ps: {"params": ps[0]},
    ),
    "a set": (TypeError, "ordered collections", lambda ps: {"params": {_like(ps)}}),
    "no dict": (TypeError, "must be a dict", lambda ps: [_like(ps)]),
    "no params": (
        ValueError,
        "group 1: it needs 'params', got the keys .'param'",
        lambda ps: {"param": ps[0]},
    ),
    "no tensor": (TypeError, "can only optimize Tensors", lambda ps: {"params": [1.0]}),
    "a non-leaf": (ValueError, "non-leaf", lambda ps: {"params": [ps[0] * 2]}),
    "integers": (
        ValueError,
        "group 1 has dtype torch.int64",
        lambda ps: {"params": [torch.ones(2, 2).long()]},
    ),
    "names": (ValueError, "have names, .* add the tensors alone", lambda ps: {"params": [("w", _like(ps))]}),
    "two-element lr": (ValueError, "1-element", lambda ps: {"params": _like(ps), "lr": torch.ones(2)}),
    "a bad value": (ValueError, "weight_decay", lambda ps: {"params": _like(ps), "weight_decay": -1}),
    "an unknown rule": (ValueError, "did you mean", lambda ps: {"params": _like(ps), "rule": "lionn"}),
}


@for_each(("rule", "error"), spread(RULES, ERRORS, alike=reach))
def test_add_param_group_checks_what_the_constructor_checks(rule: Case, error: str):
    kind, words, bad_group = ERRORS[error]
    params = rule.params()
    optimizer = rule.make(params)
    steps(optimizer, params, range(2))
    before = snapshot(optimizer, params)
    with pytest.raises(kind, match=words):
        optimizer.add_param_group(bad_group(params))
    assert identical(snapshot(optimizer, params), before)


@for_each("rule", RULES)
def test_duplicates_in_an_added_group_warn(rule: Case):
    optimizer = rule.make(rule.params())
    param = rule.ones(2)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer.add_param_group({"params": [param, param]})


@for_each("case", CASES)
def test_an_option_changed_between_steps_acts_from_the_next(case: Case):
    params, twins = case.params(), case.params()
    optimizer, twin = case.make(params), case.make(twins)
    steps(optimizer, params, range(2))
    steps(twin, twins, range(2))
    optimizer.param_groups[0]["maximize"] = True
    steps(optimizer, params, [2])
    set_gradients(twins, 2)
    for param in twins:
        param.grad.neg_()
    twin.step()
    assert identical(params, twins)


@for_each("case", CASES)
def test_groups_may_be_removed(case: Case):
    params = case.params()
    optimizer = case.make([{"params": [param]} for param in params])
    steps(optimizer, params, range(2))
    del optimizer.param_groups[0]
    frozen = values(params[:1])
    steps(optimizer, params, range(2, 4))
    assert identical(params[:1], frozen)
    assert optimizer.skipped_steps == 0


@for_each("case", CASES)
def test_a_group_without_parameters_is_tolerated(case: Case):
    params, twins = case.params(), case.params()
    optimizer = case.make([{"params": []}, {"params": params}])
    assert identical(train(optimizer, params), train(case.make(twins), twins))
    again = case.make([{"params": []}, {"params": params}])
    again.load_state_dict(optimizer.state_dict())
    assert identical(again.state_dict(), optimizer.state_dict())


def test_a_generator_of_parameters_survives_a_refusal():
    """Otherwise the second try with the same dict would add a group without parameters."""
    optimizer = steepest.Muon([Parameter(torch.ones(2, 2))])
    vector = Parameter(torch.ones(3))
    group: dict[str, object] = {"params": (param for param in [vector])}
    with pytest.raises(ValueError, match="takes matrices"):
        optimizer.add_param_group(group)
    group["rule"] = "adamw"
    optimizer.add_param_group(group)
    assert optimizer.param_groups[1]["params"] == [vector]
