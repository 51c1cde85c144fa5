"""Each group says what it is, and holds the options of its own rule alone; classes are named after rules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

import steepest
from loops import for_each
from steepest.rule import find_rule

from .training import Transformer, same_bits, take_steps

OURS = {"params", "param_names", "name", "rule", "base_lr", "skipped_steps", "state_format"}
CYCLED = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}


THREE = ["muon", "adamw", "adamw, no decay"]


def _names(optimizer: torch.optim.Optimizer) -> list[str]:
    return [group["name"] for group in optimizer.param_groups]


@pytest.mark.parametrize(
    ("rule", "options", "names"),
    [
        ("muon", {}, ["muon", "adamw", "adamw, no decay"]),
        ("lion", {"weight_decay": 0.1}, ["lion", "lion, no decay"]),
        ("lion", {"decay_vectors": True}, ["lion"]),
        ("lion", {"weight_decay": 0.0}, ["lion"]),
        ("lion", {}, ["lion", "lion, no decay"]),
        ("sgd", {}, ["sgd", "sgd, no decay"]),
        (
            "muon",
            {"overrides": {"blocks.[12].*.weight": {"lr": 0.5}}},
            [*THREE, "muon, lr 0.5", "adamw, no decay, lr 0.5"],
        ),
        (
            "muon",
            {"overrides": {"head.bias": {"lr": 0.5}, "embed.weight": "lion"}},
            ["muon", "adamw", "adamw, no decay", "adamw, no decay, lr 0.5", "lion"],
        ),
        (
            "adamw",
            {"overrides": {"embed.weight": {"betas": (0.5, 0.9)}, "head.weight": {"betas": (0.6, 0.9)}}},
            ["adamw", "adamw, betas 0.5/0.9", "adamw, no decay", "adamw, betas 0.6/0.9"],
        ),
    ],
)
def test_names(rule: str, options: dict[str, Any], names: list[str]):
    found = _names(steepest.build(Transformer(), rule, **options))
    assert sorted(found) == sorted(names)
    assert len(set(found)) == len(found)


def test_with_layers_they_tell_the_layer():
    names = _names(steepest.build(Transformer(), "muon", layer_decay=0.5))
    assert names[:3] == ["muon, layer 1", "muon, layer 2", "muon, layer 3"]
    assert {"adamw, layer 0", "adamw, no decay, layer 2", "adamw, layer 4"} < set(names)
    assert len(set(names)) == len(names)


def _foreign(optimizer: torch.optim.Optimizer, allowed: set[str]) -> set[str]:
    """Return the keys of groups that are neither their rule's nor allowed."""
    found = set()
    for group in optimizer.param_groups:
        rule = find_rule(group["rule"])
        found |= group.keys() - rule.defaults().keys() - rule.conventions.keys() - allowed
    return found


@for_each("main", ["muon", "signgsd", "sgd", "quad", "adam_mini"])
@for_each("other", ["lion", "sgd", "signgsd", "simba_leaky"])
@for_each("schedule", [None, OneCycleLR, CyclicLR])
def test_a_group_holds_the_keys_of_its_rule_alone(main: str, other: str, schedule: Any):
    """But for betas, which both schedulers read in every group where the main rule has some.

    Where it has none, they write a momentum into every group, and the next step takes it out again.
    """
    model = Transformer()
    optimizer = steepest.build(model, main, fallback=other, overrides={"head.*": other})
    betas = "betas" in optimizer.defaults
    kept, written = ({"betas"}, set()) if betas else (set(), {"momentum"})
    assert _foreign(optimizer, OURS) <= kept
    if schedule is not None:
        rates = {"total_steps": 9} if schedule is OneCycleLR else {"base_lr": 0.01}
        scheduler = schedule(optimizer, max_lr=0.1, **rates)
        for step in range(2):
            assert _foreign(optimizer, OURS | CYCLED) <= kept | written
            take_steps(optimizer, model, [step])
            assert _foreign(optimizer, OURS | CYCLED) <= kept
            scheduler.step()


RULES = [rule for rule in steepest.list_optimizers() if rule != "orthogonalized"]  # which needs a subclass


@for_each("main", RULES)
def test_beside_every_rule_no_group_has_foreign_keys_but_betas(main: str):
    """torch's schedulers and Lightning's monitor read betas in every group where the main rule has them."""
    params = {rule: nn.Parameter(torch.ones(2, 2)) for rule in [main, *RULES]}
    groups = [{"params": [param], "rule": rule} for rule, param in params.items()]
    optimizer = steepest.Optimizer(groups)
    betas = optimizer.defaults.get("betas")
    for group in optimizer.param_groups:
        rule = find_rule(group["rule"])
        strange = group.keys() - rule.defaults().keys() - rule.conventions.keys() - OURS
        assert strange == ({"betas"} if betas is not None and "betas" not in rule.hyper else set())
        if strange:
            assert group["betas"] == betas


def test_betas_of_another_rule_change_nothing():
    model, twin = Transformer(), Transformer()
    optimizer, other = (steepest.build(m, "lion", overrides={"head.*": "sgd"}) for m in (model, twin))
    for group in other.param_groups:
        if group["rule"] == "sgd":
            group["betas"] = (0.1, 0.2)
    for each, by in ((model, optimizer), (twin, other)):
        take_steps(by, each, range(3))
    assert same_bits(model, twin)


def test_onecycle_cycles_the_momentum_of_all_groups_as_two_optimizers_would():
    model, twin = Transformer(), Transformer()
    optimizer = steepest.build(model, "muon", lr=0.01)
    built = steepest.build(twin, "muon", lr=0.01)
    scheduler = OneCycleLR(optimizer, max_lr=0.02, total_steps=6)
    by_hand = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.01, momentum=0.9)
    plan = OneCycleLR(by_hand, max_lr=0.02, total_steps=6)
    for step in range(5):
        momentum, lr = by_hand.param_groups[0]["momentum"], by_hand.param_groups[0]["lr"]
        for group in built.param_groups:
            group["lr"] = lr
            if group["rule"] == "muon":
                group["momentum"] = momentum
            else:
                group["betas"] = (momentum, group["betas"][1])
        take_steps(optimizer, model, [step])
        take_steps(built, twin, [step])
        by_hand.step()
        scheduler.step()
        plan.step()
    assert same_bits(model, twin)


def test_checkpoints_from_before_load_bit_for_bit():
    """Their groups had no names, and after OneCycleLR keys of other rules."""
    model, twin = Transformer(), Transformer()
    optimizer, again = steepest.build(model, "muon", lr=0.02), steepest.build(twin, "muon", lr=0.01)
    take_steps(optimizer, model, range(2))
    twin.load_state_dict(model.state_dict())
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["name"]
        if group["rule"] == "adamw":
            group |= {"momentum": 0.5, "nesterov": True, "views": None}
    again.load_state_dict(saved)
    assert _names(again) == _names(optimizer)
    assert [group.keys() for group in again.param_groups] == [g.keys() for g in optimizer.param_groups]
    take_steps(optimizer, model, range(2, 4))
    take_steps(again, twin, range(2, 4))
    assert same_bits(model, twin)


def test_names_are_those_of_the_optimizer_that_loads():
    optimizer, again = (steepest.build(Transformer(), "muon") for _ in range(2))
    again.param_groups[0]["name"] = "matrices"
    again.load_state_dict(optimizer.state_dict())
    assert _names(again) == ["matrices", "adamw", "adamw, no decay"]
    theirs = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(2))], "name": "theirs"}])
    ours = steepest.AdamW([nn.Parameter(torch.ones(2))])
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ({}, "muon (2)"),
        ({"lr": 0.5}, "muon, lr 0.5"),
        ({"rule": "adamw"}, "adamw (2)"),
        ({"rule": "adamw", "weight_decay": 0.0}, "adamw, no decay (2)"),
        ({"rule": "adamw", "betas": (0.5, 0.9)}, "adamw, betas 0.5/0.9"),
        ({"rule": "lion"}, "lion"),
        ({"name": "mine"}, "mine"),
    ],
)
def test_a_group_that_is_added_later_is_named_like_those_of_build(group: dict[str, Any], name: str):
    model, later = Transformer(), nn.Linear(4, 4, bias=False)
    optimizer = steepest.build(model, "muon", fallback_lr=find_rule("adamw").own_defaults["lr"])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(2):  # which moves the others' lr, and counts
        take_steps(optimizer, model, [step])
        scheduler.step()
    optimizer.param_groups[0]["skipped_steps"] += 1
    optimizer.add_param_group({"params": [("later.weight", later.weight)], **group})
    assert _names(optimizer) == [*THREE, name]


def test_names_of_added_groups_differ_and_resume():
    def make() -> tuple[list[nn.Parameter], steepest.Optimizer]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(3, 3)) for _ in range(4)]
        optimizer = steepest.Lion([{"params": [params[0]], "name": "lion (2)"}])
        for param in params[1:]:
            optimizer.add_param_group({"params": [param]})
        return params, optimizer

    (params, optimizer), (_, again) = make(), make()
    assert _names(optimizer) == ["lion (2)", "lion", "lion (3)", "lion (4)"]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    again.load_state_dict(optimizer.state_dict())
    assert _names(again) == _names(optimizer)


def test_groups_beside_one_without_a_name_have_none():
    optimizer = steepest.Lion([nn.Parameter(torch.ones(2))])
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert not any("name" in group for group in optimizer.param_groups)


def test_the_class_is_named_after_the_rules():
    optimizer = steepest.build(Transformer(), "muon", overrides={"embed.weight": "lion"})
    assert type(optimizer).__name__ == "Muon+AdamW+Lion"
    assert type(steepest.build(Transformer(), "sgd_sai")).__name__ == "SGDSaI"
    assert isinstance(optimizer, steepest.Optimizer)
    assert type(steepest.build(Transformer(), "muon")) is type(steepest.build(Transformer(), "muon"))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_copies_and_pickles_are_of_that_class_and_go_on(protocol: int):
    model = Transformer()
    optimizer = steepest.build(model, "muon", lr=0.02)
    take_steps(optimizer, model, range(2))
    pairs = [
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer), protocol)),
    ]
    take_steps(optimizer, model, range(2, 4))
    for twin, again in pairs:
        assert type(again) is type(optimizer)
        take_steps(again, twin, range(2, 4))
        assert same_bits(model, twin)


def test_the_repr_fits_a_screen():
    optimizer = steepest.build(Transformer(), "muon", lr=0.02)
    shown = "lr: 0.02, weight_decay: 0.01"
    assert repr(optimizer).splitlines() == [
        "Muon+AdamW(3 groups, 36 tensors, 1,987 parameters",
        f"  Parameter Group 0 (muon): 12 tensors, 1,536 parameters; {shown}, views: of 3 tensors",
        f"  Parameter Group 1 (adamw): 3 tensors, 208 parameters; {shown}",
        "  Parameter Group 2 (adamw, no decay): 21 tensors, 243 parameters; lr: 0.02, weight_decay: 0",
        ")",
    ]
    many = repr(steepest.build(Transformer(depth=12), "muon", layer_decay=0.9)).splitlines()
    assert len(many) <= 20
    assert "more groups: see explain()" in many[-2]
    assert max(map(len, many)) <= 110
