from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from steepest.lab import LabError
from steepest.lab.contestant import enlist


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(3, 2)


ROUTED = [name for name in steepest.list_optimizers() if name != "orthogonalized"]


@pytest.fixture
def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))


@pytest.mark.parametrize("name", ROUTED)
def test_every_registered_optimizer_enlists_with_its_own_defaults(name: str, deep: nn.Module) -> None:
    (contestant,) = enlist([name], deep)
    own = steepest.create(name, [deep[1].weight]).defaults
    assert contestant.default_lr == own["lr"]
    assert contestant.hyper["rule"] == name
    assert set(own) - {"lr"} <= set(contestant.hyper)
    assert json.loads(json.dumps(contestant.hyper)) == contestant.hyper
    groups = contestant.build(deep, 0.25).param_groups
    assert {group["lr"] for group in groups if group["rule"] == name} == {0.25}


def test_a_matrix_rule_gets_the_hidden_matrices_and_adamw_the_rest(deep: nn.Module) -> None:
    (contestant,) = enlist(["muon"], deep)
    groups = contestant.build(deep, 0.25).param_groups
    ours = [p for group in groups if group["rule"] == "muon" for p in group["params"]]
    assert [id(p) for p in ours] == [id(deep[0].weight), id(deep[1].weight)]
    assert {(group["rule"], group["lr"]) for group in groups} == {("muon", 0.25), ("adamw", 0.25)}


def test_a_base_class_that_is_no_optimizer_by_itself_is_refused(deep: nn.Module) -> None:
    with pytest.raises(LabError, match="orthogonalized"):
        enlist(["orthogonalized"], deep)


def test_any_factory_may_race_under_a_label(model: nn.Module) -> None:
    (contestant,) = enlist([("mine", partial(torch.optim.SGD, momentum=0.5))], model)
    assert contestant.label == "mine"
    assert contestant.hyper["momentum"] == 0.5


def test_a_class_races_under_its_name(model: nn.Module) -> None:
    assert [c.label for c in enlist([torch.optim.Adam, needs_no_label, "lion"], model)] == [
        "Adam",
        "needs_no_label",
        "lion",
    ]


def needs_no_label(params: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


@pytest.mark.parametrize("entry", ["lion", ("mine", torch.optim.SGD)])
def test_frozen_parameters_stay(entry: Any, model: nn.Module) -> None:
    model.requires_grad_(False)
    model.bias.requires_grad_(True)
    before = model.weight.clone()
    (contestant,) = enlist([entry], model)
    optimizer = contestant.build(model, 0.1)
    model(torch.ones(1, 3)).sum().backward()
    start = model.bias.detach().clone()
    optimizer.step()
    assert torch.equal(model.weight, before)
    torch.testing.assert_close(model.bias.detach(), start - 0.1)


def needs_lr(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "no optimizers to race: name at least one, .*steepest has .*lion"),
        ([torch.optim.LBFGS], "LBFGS cannot race: its step.* needs 'closure'"),
        ([partial(torch.optim.SGD, momentum=0.5)], "without a name: enter it as .'label'"),
        ([lambda params: None], "without a name"),
        ([("none", lambda params: None)], "none: .*NoneType"),
        ([("fixed", lambda params: torch.optim.SGD(params, lr=0.1))], "fixed: it must take lr= .*'lr'"),
        ([3], "an optimizer is a name, .*, not 3"),
        ([("sgd", torch.optim.SGD, 0.1)], "an optimizer is a name, a torch optimizer class or a"),
        ([torch.optim.SGD, ("SGD", torch.optim.SGD)], "'SGD' is entered twice"),
        (["lion", "lion"], "'lion' is entered twice"),
        (["lion", "loin"], r"unknown rule 'loin' .*lion"),
        ([("strict", needs_lr)], "strict: .*lr"),
        ([("still", partial(torch.optim.SGD, lr=0.0))], "still has no positive default lr"),
    ],
)
def test_bad_entries_are_refused(entries: list[Any], words: str, model: nn.Module) -> None:
    with pytest.raises(LabError, match=words):
        enlist(entries, model)
