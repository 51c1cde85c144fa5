"""Flat dicts of tensors with JSON. That every rule resumes from them: contract/test_resume.py."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import steepest


def test_what_json_lacks_comes_back_with_its_type():
    lr = torch.tensor(0.1)
    tree: dict[str, Any] = {
        "state": {0: {"exp_avg": torch.ones(2, 3).t()}, 10: {}},
        "param_groups": [{"lr": lr, "betas": (0.9, 0.1 + 0.2), "dtype": torch.bfloat16, "none": None}],
        "numbers": [1, True, float("inf"), -0.0, "text"],
    }
    tensors, metadata = steepest.flatten_state_dict(tree)
    assert set(tensors) == {"state.0.exp_avg", "param_groups.0.lr"}
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert {type(text) for text in metadata.values()} == {str}
    again = steepest.unflatten_state_dict(tensors, metadata)
    assert torch.equal(again["state"][0].pop("exp_avg"), tree["state"][0].pop("exp_avg"))
    assert again["param_groups"][0].pop("lr") is not None
    del tree["param_groups"][0]["lr"]
    assert repr(again) == repr(tree)


def test_a_view_among_the_options_survives():
    qkv = torch.nn.Linear(4, 12, bias=False)
    views = {"weight": steepest.views.rows(4, 4, 4)}
    optimizer = steepest.Muon(qkv.named_parameters(), views=views)
    flat = steepest.flatten_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(steepest.unflatten_state_dict(*flat))
    assert optimizer.param_groups[0]["views"] == views


def test_what_cannot_be_written_is_named():
    with pytest.raises(TypeError, match=r"'param_groups\.0\.f' of the state dict is <function"):
        steepest.flatten_state_dict({"param_groups": [{"f": lambda: None}]})


def test_what_does_not_belong_together_is_refused():
    tensors, metadata = steepest.flatten_state_dict({"state": {0: {"exp_avg": torch.ones(1)}}})
    with pytest.raises(ValueError, match=r"the tensor 'state\.0\.exp_avg' of the state dict is missing"):
        steepest.unflatten_state_dict({}, metadata)
    with pytest.raises(ValueError, match="the metadata has no 'state_dict'"):
        steepest.unflatten_state_dict(tensors, {"format": json.dumps("pt")})


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ({"a": {1: torch.ones(1), "1": torch.zeros(1)}}, "a.1"),
        ({"a.b": {"c": torch.ones(1)}, "a": {"b.c": torch.zeros(1)}}, "a.b.c"),
    ],
    ids=["number and text", "dots"],
)
def test_a_name_that_two_tensors_would_have_is_refused(tree: dict[str, Any], name: str):
    with pytest.raises(ValueError, match=f"would have the name '{name}'"):
        steepest.flatten_state_dict(tree)


def test_tensors_that_are_left_over_are_named():
    tensors, metadata = steepest.flatten_state_dict({"state": {0: {"exp_avg": torch.ones(1)}}})
    with pytest.raises(ValueError, match="that the state dict does not have: 'other'"):
        steepest.unflatten_state_dict({**tensors, "other": torch.ones(1)}, metadata)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "the 'state_dict' of the metadata is not JSON"),
        ("3", "the 'state_dict' of the metadata is not a dict"),
        ('{"dtype": "Tensor"}', "the dtype 'Tensor' of the state dict is not a torch dtype"),
        ('{"set": []}', "the state dict has a 'set'"),
    ],
)
def test_a_text_that_is_no_state_dict_is_refused(text: str, words: str):
    with pytest.raises(ValueError, match=words):
        steepest.unflatten_state_dict({}, {"state_dict": text})
