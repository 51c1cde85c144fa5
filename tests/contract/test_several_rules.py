"""One optimizer may hold several rules: each group is stepped as by an optimizer of its own."""

from __future__ import annotations

import pytest
import torch

import steepest

from .cases import LR, RULES, Case, by_id, deterministic
from .training import identical, set_gradients


@pytest.mark.parametrize("first", RULES, ids=by_id)
def test_several_rules_in_one_optimizer_are_several_optimizers(first: Case):
    """Every rule stands first once: noise is keyed by a parameter's place in the optimizer."""
    cases = [first, *(case for case in RULES if case != first)]
    quiet = [case for case in cases[1:] if deterministic(case)]
    cases = [first, *quiet, *(case for case in cases[1:] if case not in quiet)]
    params = first.params(torch.bfloat16, shapes=[(4, 3)] * len(cases))
    twins = first.params(torch.bfloat16, shapes=[(4, 3)] * len(cases))
    groups = [{"params": [p], "rule": case.name, "lr": LR} for p, case in zip(params, cases, strict=True)]
    together = steepest.Optimizer(groups, rule=first.name, nonfinite="skip")
    apart = [case.make([twin], nonfinite="skip") for twin, case in zip(twins, cases, strict=True)]
    for step in range(4):
        set_gradients(params, step)
        set_gradients(twins, step)
        together.step()
        for optimizer in apart:
            optimizer.step()
    compared = 1 + len(quiet)
    assert identical(params[:compared], twins[:compared])
    for param, twin, optimizer in zip(params[:compared], twins, apart, strict=False):
        assert identical(together.state.get(param, {}), optimizer.state.get(twin, {}))


@pytest.mark.parametrize("case", RULES, ids=by_id)
def test_a_group_s_rule_has_its_own_defaults_and_the_optimizer_s_common_options(case: Case):
    common = {"state_dtype": torch.float64, "nonfinite": "raise", "rounding": "stochastic", "seed": 3}
    other = next(c for c in RULES if c.name != case.name)
    groups = [{"params": case.params(), "rule": case.name}, {"params": other.params()}]
    optimizer = steepest.Optimizer(groups, rule=other.name, lr=7.0, **other.can(weight_decay=0.5), **common)
    group = optimizer.param_groups[0]
    for name, hyper in case.rule.hyper.items():
        assert group[name] == hyper.default, name
    assert {name: group[name] for name in common} == common
    assert group["weight_decay_method"] == case.rule.weight_decay_method
    assert optimizer.param_groups[1]["lr"] == 7.0
