"""State dicts of other optimizers, and damaged ones: loaded where they fit, refused by name elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch

import steepest


def stepped(make, shape=(3,)):
    weight = torch.nn.Parameter(torch.ones(shape))
    optimizer = make([weight])
    weight.grad = torch.full(shape, 0.5)
    optimizer.step()
    return weight, optimizer


def refused(optimizer, state_dict, words):
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(state_dict)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert str(after["state"]) == str(before["state"])


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (torch.optim.AdamW, steepest.Lion, "'amsgrad', 'eps'"),
        (lambda p: torch.optim.SGD(p, momentum=0.9), steepest.Signum, "'dampening', 'nesterov'"),
        (torch.optim.Adagrad, steepest.SGD, "another optimizer's"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), steepest.AdamW, "L2"),
    ],
)
def test_another_optimizers_state_dict_is_refused(theirs, ours, words):
    _, saved = stepped(theirs)
    _, optimizer = stepped(ours)
    refused(optimizer, saved.state_dict(), words)


def test_torchs_adam_with_l2_goes_on_with_l2():
    weight, saved = stepped(lambda p: torch.optim.Adam(p, weight_decay=0.1))
    twin = torch.nn.Parameter(weight.detach().clone())
    optimizer = steepest.AdamW([twin], weight_decay_method="l2")
    optimizer.load_state_dict(saved.state_dict())
    for gradient in (0.3, -0.2):
        weight.grad, twin.grad = torch.full((3,), gradient), torch.full((3,), gradient)
        saved.step()
        optimizer.step()
    torch.testing.assert_close(twin, weight, rtol=1e-6, atol=0)


def test_counters_of_another_dtype_are_refused():
    _, optimizer = stepped(lambda p: steepest.Simba(p, counter_dtype=torch.int16))
    for wrong in (torch.float32, torch.int8):
        state_dict = copy.deepcopy(optimizer.state_dict())
        state_dict["state"][0]["counts"] = state_dict["state"][0]["counts"].to(wrong)
        refused(optimizer, state_dict, f"'counts' .* has dtype {wrong}")


def test_state_that_is_no_tensor_is_refused():
    _, optimizer = stepped(steepest.Lion)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0]["exp_avg"] = [1.0, 2.0, 3.0]
    refused(optimizer, state_dict, "'exp_avg' .* is a list")


def test_independent_decay_is_relative_to_the_loaded_groups_own_learning_rate():
    _, saved = stepped(lambda p: torch.optim.SGD(p, lr=10.0, momentum=0.9))
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = steepest.SGD(
        [weight], lr=0.1, momentum=0.9, weight_decay=0.1, weight_decay_method="independent"
    )
    optimizer.load_state_dict(saved.state_dict())
    optimizer.param_groups[0]["weight_decay"] = 0.1
    optimizer.state.clear()
    weight.grad = torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))
