from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from steepest.lab import LabError
from steepest.lab.optimizer_spec import resolve_optimizers


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(3, 2)


ROUTED = [name for name in steepest.list_optimizers() if name != "orthogonalized"]


@pytest.fixture
def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))


@pytest.mark.parametrize("name", ROUTED)
def test_every_registered_optimizer_keeps_its_own_defaults(name: str, deep: nn.Module) -> None:
    (spec,) = resolve_optimizers([name], deep)
    own = steepest.create(name, [deep[1].weight]).defaults
    assert spec.default_lr == own["lr"]
    assert spec.hyper["rule"] == name
    assert set(own) - {"lr"} <= set(spec.hyper)
    assert json.loads(json.dumps(spec.hyper)) == spec.hyper
    groups = spec.build(deep, 0.25).param_groups
    assert {group["lr"] for group in groups if group["rule"] == name} == {0.25}


def test_a_matrix_rule_gets_the_hidden_matrices_and_adamw_the_rest(deep: nn.Module) -> None:
    (spec,) = resolve_optimizers(["muon"], deep)
    groups = spec.build(deep, 0.25).param_groups
    ours = [p for group in groups if group["rule"] == "muon" for p in group["params"]]
    assert [id(p) for p in ours] == [id(deep[0].weight), id(deep[1].weight)]
    assert {(group["rule"], group["lr"]) for group in groups} == {("muon", 0.25), ("adamw", 0.25)}


def test_the_base_class_for_user_defined_optimizers_is_rejected(deep: nn.Module) -> None:
    with pytest.raises(LabError, match="orthogonalized"):
        resolve_optimizers(["orthogonalized"], deep)


def test_a_factory_can_have_a_label(model: nn.Module) -> None:
    (spec,) = resolve_optimizers([("mine", partial(torch.optim.SGD, momentum=0.5))], model)
    assert spec.label == "mine"
    assert spec.hyper["momentum"] == 0.5


def test_a_class_is_labelled_with_its_name(model: nn.Module) -> None:
    assert [c.label for c in resolve_optimizers([torch.optim.Adam, needs_no_label, "lion"], model)] == [
        "Adam",
        "needs_no_label",
        "lion",
    ]


def needs_no_label(params: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


@pytest.mark.parametrize("entry", ["lion", ("mine", torch.optim.SGD)])
def test_frozen_parameters_do_not_change(entry: Any, model: nn.Module) -> None:
    model.requires_grad_(False)
    model.bias.requires_grad_(True)
    before = model.weight.clone()
    (spec,) = resolve_optimizers([entry], model)
    optimizer = spec.build(model, 0.1)
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
        ([torch.optim.LBFGS], "LBFGS cannot race: its step.* needs 'closure', which the race does not pass"),
        ([partial(torch.optim.SGD, momentum=0.5)], "an optimizer has no name: pass it as .'label'"),
        ([lambda params: None], "has no name"),
        ([("none", lambda params: None)], "none: .*NoneType"),
        ([("fixed", lambda params: torch.optim.SGD(params, lr=0.1))], "fixed: it must accept lr= .*'lr'"),
        ([3], "an optimizer must be a name, .*, not 3"),
        ([("sgd", torch.optim.SGD, 0.1)], "an optimizer must be a name, a class or a"),
        ([torch.optim.SGD, ("SGD", torch.optim.SGD)], "'SGD' is listed twice"),
        (["lion", "lion"], "'lion' is listed twice"),
        (["lion", "loin"], r"unknown rule 'loin' .*lion"),
        ([("strict", needs_lr)], "strict: .*lr"),
        ([("still", partial(torch.optim.SGD, lr=0.0))], "still has no positive default lr"),
    ],
)
def test_invalid_entries_are_rejected(entries: list[Any], words: str, model: nn.Module) -> None:
    with pytest.raises(LabError, match=words):
        resolve_optimizers(entries, model)
