"""Only Transformers' save_pretrained warns of ternary layers without a record, and only of those."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
from torch import nn

from steepest.ternary import densify, ternarize

# As the method calls it, in a module of this name.
SAVING = (
    "def save_pretrained(model): return model.state_dict()\ndef collect(model): return model.state_dict()"
)


class Model(nn.Sequential):
    hf_quantizer: Any = None

    def save_pretrained(self) -> None:
        """Never called: its module is this one."""


def made() -> Model:
    return Model(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def messages(
    model: nn.Module, module: str = "transformers.modeling_utils", call: str = "save_pretrained"
) -> int:
    names: dict[str, Any] = {"__name__": module}
    exec(SAVING, names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names[call](model)
    return sum("record_ternary" in str(each.message) for each in caught)


def test_it_warns_once_however_often_layers_were_replaced():
    model = made()
    assert messages(model) == 0
    ternarize(model, include="0")
    ternarize(model, include="2")
    assert messages(model) == 1
    assert messages(copy.deepcopy(model)) == messages(pickle.loads(pickle.dumps(model))) == 1


def test_other_ways_to_save_and_recorded_or_dense_models_are_left_alone():
    model = made()
    ternarize(model)
    assert messages(model, call="collect") == messages(model, module="diffusers.models") == 0
    model.hf_quantizer = object()
    assert messages(model) == 0
    model.hf_quantizer = None
    densify(model)
    assert messages(model) == 0


def test_a_model_without_the_method_has_no_hook():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    ternarize(model)
    assert not model._state_dict_pre_hooks


@pytest.mark.parametrize("nested", [False, True])
def test_the_model_that_is_saved_is_asked(nested: bool):
    """Saved within another, which does not save its layers by Transformers, it says nothing."""
    model = made()
    ternarize(model)
    assert messages(nn.Sequential(model) if nested else model) == (not nested)
