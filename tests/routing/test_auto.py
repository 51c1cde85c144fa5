"""Auto is build() as an optimizer's class, for callers that know nothing else."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import steepest

from .training import Transformer, same_bits, take_steps


def test_it_is_a_class_of_optimizers_under_its_path():
    module, _, name = "steepest.Auto".rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    assert issubclass(cls, torch.optim.Optimizer)
    optimizer = cls(Transformer(), "muon", lr=0.5)
    assert isinstance(optimizer, cls)
    assert type(optimizer).__name__ == "Muon+AdamW"
    assert torch.optim.lr_scheduler.LinearLR(optimizer).get_last_lr()[0] == pytest.approx(0.5 / 3)


def _model(model: nn.Module) -> Any:
    return model


@pytest.mark.parametrize("given", [_model, nn.Module.parameters, nn.Module.named_parameters])
def test_it_steps_as_build_does(given: Any):
    model, twin = Transformer(), Transformer()
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "fallback": "lion", "momentum": 0.9}
    ours, built = steepest.Auto(given(model), "muon", **options), steepest.build(twin, "muon", **options)
    assert str(ours.explain()) == str(built.explain())
    take_steps(ours, model)
    take_steps(built, twin)
    assert same_bits(model, twin)
    built.load_state_dict(ours.state_dict())


def test_callers_may_name_the_argument_and_pass_options_in_a_dict():
    model = Transformer()
    optimizer = steepest.Auto(params=model.parameters(), rule="muon", hyper={"momentum": 0.5}, nesterov=False)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.5, False)
    with pytest.raises(TypeError, match=r"'momentun' .did you mean 'momentum'"):
        steepest.Auto(model, hyper={"momentun": 0.5})


def test_its_arguments_are_those_of_build_with_their_defaults():
    """They are written out for parsers of command lines, which read the signature."""
    ours, built = (inspect.signature(each).parameters for each in (steepest.Auto, steepest.build))
    own = {"params", "weight_decay", "hyper", "options"}
    assert ours.keys() - own == built.keys() - {"model", "hyper"}
    for name in ours.keys() - own:
        assert ours[name].default == built[name].default
    assert (
        next(iter(ours)) == "params"
    )  # LightningCLI passes the first argument itself, and knows it by this name


def test_subclasses_hooks_copies_and_pickles():
    class Mine(steepest.Auto):
        pass

    globals()["Mine"] = Mine
    Mine.__qualname__ = "Mine"
    calls: list[int] = []
    model = Transformer()
    optimizer = Mine(model)
    assert isinstance(optimizer, Mine)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    take_steps(optimizer, model)
    assert len(calls) == 3
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(again) is type(optimizer)
        assert again.state_bytes() == optimizer.state_bytes()
        assert str(again.explain()) == str(optimizer.explain())


def _read(model: nn.Module) -> Any:
    iterator = model.parameters()
    next(iterator)
    return iterator


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (lambda model: list(model.parameters()), "list of Parameter.*steepest.Recipe.*steepest.param_groups"),
        (lambda model: [{"params": list(model.parameters())}], "param groups.*optimizer_cls_and_kwargs"),
        (steepest.param_groups, "steepest.Optimizer.groups. takes those"),
        (lambda model: dict(model.named_parameters()), "was given dict. Pass the model"),
        (lambda model: None, "was given NoneType. Pass the model"),
        (_read, "partly read"),
        (lambda model: model.parameters(recurse=False), "leaves out submodules"),
        (lambda model: model.named_parameters(prefix="student"), "pass the model"),
        (lambda model: (param for param in model.parameters()), "was given generator. Pass the model"),
    ],
)
def test_what_tells_no_model_is_refused_with_what_to_do(given: Any, match: str):
    with pytest.raises(TypeError, match=match):
        steepest.Auto(given(Transformer()))


def test_a_rule_for_matrices_that_gets_none_is_told():
    with pytest.warns(UserWarning, match="nothing goes to 'muon'") as caught:
        steepest.Auto(nn.Sequential(nn.LayerNorm(3)))
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("match", "options"),
    [
        (r"Auto\(\): hyper must be a dict of options, got \[1\]", {"hyper": [1]}),
        (r"Auto\(\): hyper must be a dict of options, got \{1: 2\}", {"hyper": {1: 2}}),
        (r"Auto\(\): 'lr' is an argument of its own and does not go into hyper", {"hyper": {"lr": 0.9}}),
        (r"Auto\(\): 'fallback' is an argument of its own", {"hyper": {"fallback": "lion"}}),
        (r"Auto\(\): 'weight_decay' is an argument of its own", {"hyper": {"weight_decay": 0.5}}),
        (r"Auto\(\): 'rule' is an argument of its own", {"hyper": {"rule": "lion"}}),
        (
            r"Auto\(\): 'nesterov' is given both in hyper and as a keyword",
            {"hyper": {"nesterov": True}, "nesterov": False},
        ),
        (r"unexpected keyword argument 'momentun' \(did you mean 'momentum'", {"hyper": {"momentun": 0.5}}),
    ],
)
def test_hyper_is_checked_first(match: str, options: dict):
    with pytest.raises(TypeError, match=match):
        steepest.Auto(torch.nn.Linear(2, 2), "muon", **options)
