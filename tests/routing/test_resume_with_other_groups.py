"""A checkpoint of other param groups is refused with both sides' groups, and the way to load it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from steepest.migrations import SOURCES


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))


def _trained(model: nn.Module, optimizer: Any) -> Any:
    model(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()
    return optimizer


def _refusal(optimizer: Any, saved: dict[str, Any]) -> str:
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="nothing was loaded") as refused:
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == str(before)
    return str(refused.value)


def _saved(make: Any) -> dict[str, Any]:
    model = _model()
    return copy.deepcopy(_trained(model, make(model)).state_dict())


@pytest.mark.parametrize(
    ("saved", "here", "groups"),
    [
        ("muon", "adamw", "3 groups (muon; adamw, no decay; adamw), this optimizer has 2 (adamw; adamw, no"),
        (
            "adamw",
            "muon",
            "2 groups (adamw; adamw, no decay), this optimizer has 3 (muon; adamw, no decay; adamw",
        ),
        ("muon", "lion", "3 groups (muon; adamw, no decay; adamw), this optimizer has 2 (lion; lion, no"),
    ],
)
def test_another_rule(saved: str, here: str, groups: str):
    words = _refusal(
        steepest.build(_model(), here), _saved(lambda model: steepest.build(model, saved, weight_decay=0.1))
    )
    assert f"different number of parameter groups: saved with {groups}" in words
    rules = {"muon": "rules of the saved one, 'muon' and 'adamw'", "adamw": "rule of the saved one, 'adamw'"}
    assert words.endswith(f"nothing was loaded. Make the optimizer with the {rules[saved]}")


def test_the_same_rules_in_other_groups():
    saved = _saved(lambda model: steepest.build(model, "adamw", weight_decay=0.1))
    words = _refusal(steepest.AdamW(_model().parameters()), saved)
    assert "saved with 2 groups (adamw; adamw, no decay), this optimizer has 1 (adamw)" in words
    assert words.endswith("Make the optimizer with the same groups, in their order")


def test_many_groups_are_abridged():
    saved = _saved(lambda model: steepest.Lion([{"params": [each]} for each in model.parameters()]))
    saved["param_groups"] = [{**group, "params": []} for group in saved["param_groups"]] * 5
    words = _refusal(steepest.Lion(_model().parameters()), {**saved, "state": {}})
    assert "saved with 40 groups (lion; lion; lion; lion; lion; lion; lion; lion; …)" in words


@pytest.mark.parametrize("here", ["muon", "adamw"])
def test_one_group_of_torch_s_adamw(here: str):
    saved = _saved(lambda model: torch.optim.AdamW(model.parameters()))
    words = _refusal(steepest.build(_model(), here), saved)
    assert "saved with 1 group (torch.optim.Adam or AdamW), this optimizer has" in words
    assert words.endswith("Load it into steepest.AdamW(model.parameters())")


def test_several_groups_of_torch_s_sgd():
    def make(model: nn.Module) -> Any:
        return torch.optim.SGD([{"params": [each]} for each in model.parameters()])

    words = _refusal(steepest.build(_model(), "adamw"), _saved(make))
    assert words.endswith("Load it into steepest.SGD with the same groups, in their order")


def test_torch_s_muon_into_more_groups():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    saved = torch.optim.Muon(model.parameters()).state_dict()
    words = _refusal(steepest.build(model, "muon"), saved)
    assert words.endswith("Load it into steepest.Muon(model.parameters())")
    steepest.Muon(model.parameters()).load_state_dict(saved)


def test_a_source_nobody_knows():
    saved = {"state": {}, "param_groups": [{"params": [0], "lr": 0.1, "odd": 1}]}
    words = _refusal(steepest.build(_model(), "adamw"), saved)
    assert "saved with 1 group (another optimizer's), this optimizer has 2" in words
    assert words.endswith("nothing was loaded")


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_the_advice_works(name: str):
    """The class that the message names loads the checkpoint, and goes on as torch does."""
    theirs, ours = _model(), _model()
    before = _trained(theirs, getattr(torch.optim, name)(theirs.parameters(), lr=0.1))
    (source,) = [each for each in SOURCES if each.peer == ("SGD" if name == "SGD" else "AdamW")]
    after = getattr(steepest, source.peer)(ours.parameters(), lr=1.0)
    after.load_state_dict(before.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for model, optimizer in ((theirs, before), (ours, after)):
        optimizer.zero_grad()
        _trained(model, optimizer)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_every_peer_is_a_class_for_its_rules():
    for source in SOURCES:
        if source.peer:
            rule = getattr(steepest, source.peer).rule.name
            assert rule in (source.rules.split() or [rule]), source.name


def test_a_group_of_another_size():
    saved = _saved(lambda model: steepest.build(model, "muon"))
    grown = nn.Sequential(*_model(), nn.Linear(2, 2))
    words = _refusal(steepest.build(grown, "muon", fallback="adamw"), saved)
    assert words == (
        "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
        "group 0 (muon) was saved with 2 parameters, this optimizer's has 3; only here: '4.weight'; "
        "nothing was loaded"
    )


def test_a_group_of_another_size_without_names():
    saved = _saved(lambda model: torch.optim.AdamW(model.parameters()))
    words = _refusal(steepest.AdamW([*_model().parameters()][:3]), saved)
    assert words == (
        "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
        "group 0 (torch.optim.Adam or AdamW) was saved with 8 parameters, this optimizer's has 3; "
        "nothing was loaded"
    )
