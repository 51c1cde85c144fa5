"""A cycled momentum resumes where it was, in every group of an optimizer of several rules."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

import steepest

SCHEDULES = {
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=1e-2, total_steps=8),
    "CyclicLR": lambda optimizer: CyclicLR(optimizer, base_lr=1e-3, max_lr=1e-2, step_size_up=3),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rule", ["muon", "lion", "signum"])
def test_a_scheduler_made_before_loading_leaves_nothing_behind(rule, schedule):
    def prepare():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        optimizer = steepest.build(model, rule, lr=1e-2, overrides={"4.*": "adamw"})
        return model, optimizer, SCHEDULES[schedule](optimizer)

    def train(model, optimizer, scheduler):
        for seed in range(3):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    whole = prepare()
    train(*whole)
    saved = [copy.deepcopy(each.state_dict()) for each in whole]
    again = prepare()
    for each, state in zip(again, saved, strict=True):
        each.load_state_dict(state)
    train(*whole)
    train(*again)
    for ours, theirs in zip(again[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for one, other in zip(again[1].param_groups, whole[1].param_groups, strict=True):
        assert {**one, "params": None} == {**other, "params": None}
