"""build()'s groups as dicts: an optimizer of them, or of a share of them, steps as build's does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import steepest
from steepest.rule import find_rule

from .training import Transformer, same_bits, set_gradients, take_steps

OPTIONS: dict[str, Any] = {
    "lr": 0.02,
    "fallback": {"rule": "lion", "lr": 0.003},
    "views": {"blocks.0.mlp.0.weight": steepest.views.rows(8, 8)},
    "momentum": 0.9,
    "rounding": "stochastic",
    "nonfinite": "skip",
}


def test_an_optimizer_of_them_is_build_s():
    model, twin = Transformer(), Transformer()
    groups = steepest.param_groups(model, "muon", **OPTIONS)
    assert all(type(group) is dict for group in groups)
    made, built = steepest.Optimizer(groups), steepest.build(twin, "muon", **OPTIONS)
    for one, other in zip(made.param_groups, built.param_groups, strict=True):
        assert {k: v for k, v in one.items() if k != "params"} == {
            k: v for k, v in other.items() if k != "params"
        }
    take_steps(made, model)
    take_steps(built, twin)
    assert same_bits(model, twin)
    made.load_state_dict(built.state_dict())
    built.load_state_dict(made.state_dict())


def test_they_hold_names_and_the_options_of_their_rule_and_nothing_else():
    for group in steepest.param_groups(Transformer(), "muon", **OPTIONS):
        rule = find_rule(group["rule"])
        own = {"params", "param_names", "name", "rule", *rule.conventions}
        assert group.keys() == own | rule.defaults().keys()
        assert len(group["params"]) == len(group["param_names"])


def _share(groups: list[dict[str, Any]], rank: int, world: int) -> list[dict[str, Any]]:
    """Sort and divide the parameters of each group, as ZeRO does: everything else stays as it is."""
    shares = []
    for group in groups:
        by_size = sorted(group["params"], key=lambda param: param.numel(), reverse=True)
        shares.append({**group, "params": by_size[rank::world]})
    return shares


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_of_them_step_as_the_whole_does(world: int):
    """Names, by which views and noise are found, follow the parameters."""
    model, twin = (Transformer().bfloat16() for _ in range(2))
    groups = steepest.param_groups(model, "muon", **OPTIONS)
    shares = [steepest.Optimizer(_share(groups, rank, world)) for rank in range(world)]
    whole = steepest.build(twin, "muon", **OPTIONS)
    names = dict(model.named_parameters())
    for optimizer in shares:
        for group in optimizer.param_groups:
            assert [names[name] for name in group["param_names"]] == list(group["params"])
            assert set(group.get("views") or ()) <= set(group["param_names"])
    take_steps(whole, twin, range(2))
    for step in range(2):
        set_gradients(model, step)
        for optimizer in shares:
            optimizer.step()
    assert same_bits(model, twin)


def test_zero_redundancy_optimizer_takes_them(tmp_path: Path):
    model, twin = Transformer(), Transformer()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        groups = steepest.param_groups(model, "muon", **OPTIONS)
        optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=steepest.Optimizer)
        take_steps(optimizer, model)
        optimizer.consolidate_state_dict()
        assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))
    finally:
        dist.destroy_process_group()
    take_steps(steepest.build(twin, "muon", **OPTIONS), twin)
    assert same_bits(model, twin)


def test_names_that_fit_no_parameters_are_refused():
    params = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    with pytest.raises(ValueError, match="group 0: 2 parameters have 1 param_names"):
        steepest.Optimizer([{"params": params, "param_names": ["a"]}], rule="lion")


def test_names_beside_bare_tensors_are_their_names():
    weight = nn.Parameter(torch.ones(4, 2))
    group = {"params": [weight], "param_names": ["fused"], "views": {"fused": steepest.views.rows(2, 1)}}
    with pytest.raises(ValueError, match="'fused'"):
        steepest.Optimizer([group], rule="muon")


@pytest.mark.parametrize("params", [[], [torch.ones(2)], [{"params": [torch.ones(2)]}], torch.ones(2)])
def test_without_a_rule_groups_must_name_one(params: Any):
    with pytest.raises(TypeError, match="needs a rule, such as rule='lion', or groups"):
        steepest.Optimizer(params)


def test_ternary_layers_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    steepest.ternary.ternarize(model)
    with pytest.raises(ValueError, match="ternary layers, whose weights are no parameters"):
        steepest.param_groups(model, "lion")
