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


@pytest.mark.parametrize("name", steepest.list_optimizers())
def test_every_registered_optimizer_enlists_with_its_own_defaults(name: str, model: nn.Module) -> None:
    (contestant,) = enlist([name], model)
    own = steepest.create(name, model.parameters()).defaults
    assert contestant.default_lr == own["lr"]
    assert set(contestant.hyper) == set(own) - {"lr"}
    assert json.loads(json.dumps(contestant.hyper)) == contestant.hyper
    assert contestant.build(model, 0.25).param_groups[0]["lr"] == 0.25


def test_any_factory_may_race_under_a_label(model: nn.Module) -> None:
    (contestant,) = enlist([("mine", partial(torch.optim.SGD, momentum=0.5))], model)
    assert contestant.label == "mine"
    assert contestant.hyper["momentum"] == 0.5


def test_frozen_parameters_are_left_out(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.bias.requires_grad_(True)
    (contestant,) = enlist(["lion"], model)
    (group,) = contestant.build(model, 0.1).param_groups
    assert len(group["params"]) == 1
    assert group["params"][0] is model.bias


def needs_lr(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "no optimizers"),
        (["lion", "lion"], "'lion' is entered twice"),
        (["lion", "loin"], r"unknown optimizer 'loin' .*lion"),
        ([("strict", needs_lr)], "strict: .*lr"),
        ([("still", partial(torch.optim.SGD, lr=0.0))], "still has no positive default lr"),
    ],
)
def test_bad_entries_are_refused(entries: list[Any], words: str, model: nn.Module) -> None:
    with pytest.raises(LabError, match=words):
        enlist(entries, model)
