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
    defaults = case.rule.defaults()
    for name in case.rule.hyper:
        assert group[name] == defaults[name], name
    assert {name: group[name] for name in common} == common
    assert group["weight_decay_method"] == case.rule.weight_decay_method
    assert optimizer.param_groups[1]["lr"] == 7.0


def _muon_and_adamw() -> steepest.Optimizer:
    matrix, bias = torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(3))
    return steepest.Optimizer(
        [{"params": [matrix]}, {"params": [bias], "rule": "adamw", "name": "biases"}],
        rule="muon",
        extra={"qkv": [2, 2]},
        ns_steps=3,
    )


def _take_steps(optimizer: steepest.Optimizer, count: int) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(count):
        set_gradients(params, step)
        optimizer.step()


def test_a_group_of_another_rule_lacks_the_main_rule_s_options():
    optimizer = _muon_and_adamw()
    _take_steps(optimizer, 2)
    muon, adamw = steepest.rule.find_rule("muon"), steepest.rule.find_rule("adamw")
    foreign = muon.hyper.keys() - adamw.hyper.keys()
    assert {"ns_steps", "momentum", "views"} <= foreign
    again = _muon_and_adamw()
    again.load_state_dict(optimizer.state_dict())
    for groups in (optimizer.param_groups, optimizer.state_dict()["param_groups"], again.param_groups):
        assert groups[0]["ns_steps"] == 3
        assert not foreign & groups[1].keys()
        assert (groups[1]["name"], groups[1]["qkv"]) == ("biases", [2, 2])


def test_an_added_group_keeps_the_keys_that_its_own_dict_has():
    optimizer = _muon_and_adamw()
    param = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [param], "rule": "adamw", "depth": 7})
    assert optimizer.param_groups[2]["depth"] == 7
    assert "nesterov" not in optimizer.param_groups[2]
    again = _muon_and_adamw()
    again.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "rule": "adamw", "depth": 2})
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[2]["depth"] == 7


def test_a_checkpoint_whose_groups_have_the_main_rule_s_options_loads():
    """Such checkpoints exist: torch copies all defaults into every group."""
    optimizer, again = _muon_and_adamw(), _muon_and_adamw()
    _take_steps(optimizer, 2)
    saved = optimizer.state_dict()
    views = {"weight": ("rows", (2, 2))}
    copied = {name: value for name, value in optimizer.defaults.items() if name not in ("rule", "qkv")}
    saved["param_groups"][1] = {**copied, "views": views, **saved["param_groups"][1]}
    again.load_state_dict(saved)
    assert again.param_groups[1].keys() == optimizer.param_groups[1].keys()
    _take_steps(again, 2)


@pytest.mark.parametrize("main", ["adamw", "muon"])
def test_a_schedule_that_cycles_momentum_serves_groups_of_all_rules(main: str):
    """OneCycleLR reads betas in every group if the optimizer's defaults have them, and writes momentum."""
    matrix, other = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    second = "muon" if main == "adamw" else "adamw"
    optimizer = steepest.Optimizer([{"params": [matrix]}, {"params": [other], "rule": second}], rule=main)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
    for step in range(2):
        set_gradients([matrix, other], step)
        optimizer.step()
        schedule.step()
    name = "betas" if main == "adamw" else "momentum"
    first = optimizer.param_groups[0][name]
    assert (first[0] if main == "adamw" else first) != optimizer.defaults[name]


def test_a_key_that_is_another_rule_s_option_does_nothing():
    """Schedulers and old checkpoints leave such keys; the engine reads options of the own rule only."""

    def run(rule: str, shape: tuple[int, ...], **keys: object) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.full(shape, 0.3))]
        optimizer = steepest.Optimizer(params, rule=rule, lr=0.1)
        optimizer.param_groups[0] |= keys
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        return params

    assert identical(run("adamw", (5,), dtype=torch.float64), run("adamw", (5,)))
    assert identical(run("soap", (4, 3), ns_dtype="bf16", view="batch"), run("soap", (4, 3)))
