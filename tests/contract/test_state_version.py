"""Checkpoints carry the version of their format: older ones are migrated, later ones refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import steepest
from steepest.registry import create
from steepest.rule import find_rule

from .cases import RULES, Case, by_id
from .training import identical, snapshot, train

# torch.save of what the library wrote before checkpoints had a version (commit 6ae2ec1^): for each rule the
# parameters and the state dict after three steps, and the parameters two steps later.
UNVERSIONED = Path(__file__).parent / "checkpoints" / "unversioned.pt"
OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "adamw": {"amsgrad": True},
    "simba": {"counter_dtype": torch.int8, "window_size": 3},
    "soap": {"precondition_frequency": 2},
}


def _gradient(seed: int, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", sorted(torch.load(UNVERSIONED)))
@pytest.mark.filterwarnings("ignore:.*the momentum is used as it is:UserWarning")
def test_a_checkpoint_without_a_version_goes_on(name: str):
    saved = torch.load(UNVERSIONED)[name]
    assert not any("state_format" in group for group in saved["optimizer"]["param_groups"])
    params = [Parameter(param) for param in saved["params"]]
    optimizer = create(name, params, **OPTIONS.get(name, {}))
    optimizer.load_state_dict(saved["optimizer"])
    for step in (3, 4):
        for index, param in enumerate(params):
            param.grad = _gradient(10 * step + index + 100, param.shape)
        optimizer.step()
    for param, later in zip(params, saved["later"], strict=True):
        if find_rule(name).transforms:  # machines round products differently
            torch.testing.assert_close(param.detach(), later, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(param.detach(), later)
    assert optimizer.state_dict()["param_groups"][0]["state_format"] == 1


def test_there_is_such_a_checkpoint_of_every_rule_of_that_time():
    known = set(steepest.list_optimizers())
    assert len(torch.load(UNVERSIONED).keys() & known) == 18


@pytest.mark.parametrize("rule", RULES, ids=by_id)
def test_a_later_version_is_refused(rule: Case):
    params = rule.params()
    optimizer = rule.make(params)
    train(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    assert [group["state_format"] for group in saved["param_groups"]] == [1]
    saved["param_groups"][0]["state_format"] = 2
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=r"state_format 2; .* knows 1; nothing was loaded"):
        optimizer.load_state_dict(saved)
    assert identical(snapshot(optimizer, params), before)
