from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from steepest.lab import LabError
from steepest.lab.experiments.sweep import default_space
from steepest.lab.training.optimizers import resolve_optimizers


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(3, 2)


ROUTED = [name for name in steepest.list_optimizers() if name != "orthogonalized"]


@pytest.fixture
def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))


@pytest.mark.parametrize("name", ROUTED)
def test_every_registered_optimizer_keeps_its_own_defaults(name: str, deep: nn.Module) -> None:
    (spec,) = resolve_optimizers([name], deep)
    own = steepest.create(name, [deep[1].weight]).defaults
    assert spec.default_lr == own["lr"]
    assert spec.hyperparameters["rule"] == name
    options = {key: own[key] for key in spec.hyperparameters if key != "rule"}
    assert steepest.create(name, [deep[1].weight], **options).defaults == own
    assert json.loads(json.dumps(spec.hyperparameters)) == spec.hyperparameters
    groups = spec.build(deep, {"lr": 0.25}).param_groups
    assert {group["lr"] for group in groups if group["rule"] == name} == {0.25}


def test_a_matrix_rule_gets_the_hidden_matrices_and_adamw_the_rest(deep: nn.Module) -> None:
    (spec,) = resolve_optimizers(["muon"], deep)
    groups = spec.build(deep, {"lr": 0.25}).param_groups
    ours = [p for group in groups if group["rule"] == "muon" for p in group["params"]]
    assert [id(p) for p in ours] == [id(deep[0].weight), id(deep[1].weight)]
    assert {(group["rule"], group["lr"]) for group in groups} == {("muon", 0.25), ("adamw", 0.25)}


def test_the_base_class_for_user_defined_optimizers_is_rejected(deep: nn.Module) -> None:
    with pytest.raises(LabError, match="orthogonalized"):
        resolve_optimizers(["orthogonalized"], deep)


def test_a_factory_can_have_a_label(model: nn.Module) -> None:
    (spec,) = resolve_optimizers([("mine", partial(torch.optim.SGD, momentum=0.5))], model)
    assert spec.label == "mine"
    assert spec.hyperparameters["momentum"] == 0.5


def test_a_class_is_labelled_with_its_name(model: nn.Module) -> None:
    assert [c.label for c in resolve_optimizers([torch.optim.Adam, needs_no_label, "lion"], model)] == [
        "Adam",
        "needs_no_label",
        "lion",
    ]


def needs_no_label(params: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


@pytest.mark.parametrize("entry", ["lion", ("mine", torch.optim.SGD)])
def test_frozen_parameters_do_not_change(entry: Any, model: nn.Module) -> None:
    model.requires_grad_(False)
    model.bias.requires_grad_(True)
    before = model.weight.clone()
    (spec,) = resolve_optimizers([entry], model)
    optimizer = spec.build(model, {"lr": 0.1})
    model(torch.ones(1, 3)).sum().backward()
    start = model.bias.detach().clone()
    optimizer.step()
    assert torch.equal(model.weight, before)
    torch.testing.assert_close(model.bias.detach(), start - 0.1)


def needs_lr(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "no optimizers: name at least one, .*steepest has .*lion"),
        ([torch.optim.LBFGS], "LBFGS cannot be trained here: its step.* missing .* 'closure'"),
        ([partial(torch.optim.SGD, momentum=0.5)], "an optimizer has no name: pass it as .'label'"),
        ([lambda params: None], "has no name"),
        ([("none", lambda params: None)], "none: .*NoneType"),
        ([("fixed", lambda params: torch.optim.SGD(params, lr=0.1))], "fixed: it must accept lr= .*'lr'"),
        ([3], "an optimizer must be a name, .*, not 3"),
        ([("sgd", torch.optim.SGD, 0.1)], "an optimizer must be a name, a class or a"),
        ([torch.optim.SGD, ("SGD", torch.optim.SGD)], "'SGD' is listed twice"),
        (["lion", "lion"], "'lion' is listed twice"),
        (["lion", "loin"], r"unknown rule 'loin' .*lion"),
        ([("strict", needs_lr)], "strict: .*lr"),
        ([("still", partial(torch.optim.SGD, lr=0.0))], "still has no positive, finite default lr"),
        ([("huge", partial(torch.optim.SGD, lr=10**400))], "huge has no positive, finite default lr"),
    ],
)
def test_invalid_entries_are_rejected(entries: list[Any], words: str, model: nn.Module) -> None:
    with pytest.raises(LabError, match=words):
        resolve_optimizers(entries, model)


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with a factory in the current directory."""
    (tmp_path / "my_optimizers.py").write_text(
        "import torch\n"
        "def factory(params, lr=0.25, weight_decay=0.0, betas=(0.5, 0.5)):\n"
        "    return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, betas=betas)\n"
        "class Inner:\n    make = staticmethod(factory)\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "my_optimizers", raising=False)
    return "my_optimizers"


def test_anybodys_optimizer_is_named_by_module_and_attribute(own_module: str, model: nn.Module) -> None:
    entries = ["torch.optim:AdamW", f"{own_module}:factory", f"inner={own_module}:Inner.make"]
    adamw, factory, inner = resolve_optimizers(entries, model)
    assert [spec.label for spec in (adamw, factory, inner)] == [*entries[:2], "inner"]
    assert isinstance(adamw.build(model, {"lr": 0.5}), torch.optim.AdamW)
    assert adamw.hyperparameters["betas"] == [0.9, 0.999]
    assert factory.default_lr == inner.default_lr == 0.25
    assert inner.entry == f"{own_module}:Inner.make"


def test_a_label_makes_a_variant_with_its_own_settings(model: nn.Module) -> None:
    plain, heavy = resolve_optimizers(
        ["lion", "heavy=lion"], model, ["heavy.weight_decay=0.5", "heavy.betas=[0.5, 0.75]"]
    )
    assert (plain.hyperparameters["weight_decay"], heavy.hyperparameters["weight_decay"]) == (0.0, 0.5)
    assert heavy.hyperparameters["betas"] == [0.5, 0.75]
    assert heavy.settings == {"weight_decay": 0.5, "betas": (0.5, 0.75)}
    assert heavy.entry == "lion"
    group = heavy.build(model, {"lr": 0.125}).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.125, (0.5, 0.75), 0.5)


def test_settings_are_json_or_strings_for_labels_with_dots_too(model: nn.Module) -> None:
    settings = ["torch.optim:AdamW.amsgrad=true", "torch.optim:AdamW.eps=1e-3", "lion.rounding=stochastic"]
    adamw, lion = resolve_optimizers(["torch.optim:AdamW", "lion"], model, settings)
    assert adamw.settings == {"amsgrad": True, "eps": 1e-3}
    assert adamw.build(model, {"lr": 1.0}).defaults["amsgrad"] is True
    assert lion.settings == {"rounding": "stochastic"}


@pytest.mark.parametrize(
    ("entries", "settings", "words"),
    [
        (["lion"], ["loin.lr=1"], "bad setting 'loin.lr=1': write OPTIMIZER.NAME=VALUE, with one of lion"),
        (["lion"], ["lion.lr"], "bad setting 'lion.lr'"),
        (["lion"], ["lr=1"], "bad setting 'lr=1'"),
        (["lion"], ["lion.=1"], "bad setting"),
        (["lion"], ["lion.weight_decai=1"], "weight_decai.*lion"),
        (["lion"], ["lion.betas=3"], "lion.*betas"),
        (["torch.optim:AdamW"], ["torch.optim:AdamW.weight_decai=1"], "torch.optim:AdamW: .*weight_decai"),
        (["torch.optim:AdamV"], [], "cannot load 'torch.optim:AdamV': .*AdamV"),
        (["no_such_module:X"], [], "cannot load 'no_such_module:X': .*No module"),
        (["math:pi"], [], "'math:pi' is 3.14.*, not a class or a factory"),
        (["math:sqrt"], [], "math:sqrt: "),
    ],
)
def test_a_typo_is_one_clear_line(
    entries: list[str], settings: list[str], words: str, model: nn.Module
) -> None:
    with pytest.raises(LabError, match=words) as error:
        resolve_optimizers(entries, model, settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("entry", ["torch.optim:AdamW", ("mine", torch.optim.AdamW), "adamw"])
def test_gains_and_biases_do_not_decay(entry: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    nn.init.ones_(model[0].bias)  # type: ignore[arg-type]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (spec,) = resolve_optimizers([entry], model)
    optimizer = spec.build(model, {"lr": 0.5, "weight_decay": 0.25})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.5 * 0.25 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_a_decay_that_a_factory_does_not_accept_is_not_searched() -> None:
    def lr_alone(params: Any, lr: float = 0.1) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=lr)

    (spec,) = resolve_optimizers([("mine", lr_alone)], nn.Linear(2, 1))
    assert spec.hyperparameters["weight_decay"] == 0.01
    assert [*default_space(spec)] == ["lr"]
    (ours,) = resolve_optimizers("adamw", nn.Linear(2, 1))
    assert [*default_space(ours)] == ["lr", "weight_decay"]
