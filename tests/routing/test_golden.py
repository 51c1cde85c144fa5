"""Every tensor of the zoo against the table written by hand."""

from __future__ import annotations

import pytest
from torch import nn

import steepest

from .golden import GOLDEN
from .zoo import MODELS

# weight_norm's older form is deprecated, and still what many models are made with.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
]

zoo = pytest.mark.parametrize("kind", MODELS)


def test_every_model_of_the_zoo_has_its_table():
    assert GOLDEN.keys() == MODELS.keys()


@zoo
def test_every_tensor_gets_its_rule_view_and_reason(kind: str):
    optimizer = steepest.build(MODELS[kind](), "muon", lr=1e-3)
    rows = optimizer.explain().rows
    assert {row.name: (row.rule, row.view, row.kind) for row in rows} == GOLDEN[kind]


@zoo
def test_every_tensor_is_there_once_under_torchs_name(kind: str):
    model = MODELS[kind]()
    optimizer = steepest.build(model, "muon", lr=1e-3)
    ours = [
        (name, id(param))
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    ]
    assert sorted(ours) == sorted((name, id(param)) for name, param in model.named_parameters())


@zoo
def test_norms_biases_and_gains_are_not_decayed(kind: str):
    rows = steepest.build(MODELS[kind](), "muon", lr=1e-3, weight_decay=0.5).explain().rows
    assert {row.name: row.weight_decay for row in rows} == {
        name: 0.0 if entry[2] in ("norm", "bias", "gain") else 0.5 for name, entry in GOLDEN[kind].items()
    }


@zoo
def test_decay_vectors_decays_all(kind: str):
    rows = (
        steepest.build(MODELS[kind](), "muon", lr=1e-3, weight_decay=0.5, decay_vectors=True).explain().rows
    )
    assert {row.weight_decay for row in rows} == {0.5}


@zoo
@pytest.mark.parametrize("rule", ["muon", "lion", "procrustes", "normuon"])
def test_the_expected_state_is_what_the_first_step_makes(kind: str, rule: str):
    model = MODELS[kind]()
    optimizer = steepest.build(model, rule)
    expected = sum(total.state_bytes for total in optimizer.explain().totals)
    train(model, optimizer)
    assert optimizer.state_bytes() == expected > 0


@zoo
@pytest.mark.parametrize("rule", ["muon", "quad"])
def test_a_step_moves_every_trainable_tensor_and_no_frozen_one(kind: str, rule: str):
    model = MODELS[kind]()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    train(model, steepest.build(model, rule, lr=0.1, weight_decay=0.0))
    moved = {name for name, param in model.named_parameters() if not param.equal(before[name])}
    # At first lora_B = 0, and lora_A has a gradient of zero.
    assert moved == {
        name for name, param in model.named_parameters() if param.requires_grad and param.grad.any()
    }


@zoo
@pytest.mark.parametrize("rule", ["lion", "adamw", "sgd_sai", "quad", "procrustes"])
def test_a_rule_for_any_tensor_takes_them_all(kind: str, rule: str):
    explanation = steepest.build(MODELS[kind](), rule, fallback="sgd").explain()
    assert {row.rule for row in explanation.rows} == {rule}
    assert f"the fallback 'sgd' is not used: {rule!r} takes every tensor" in explanation.notes
    assert [row.kind for row in sorted(explanation.rows, key=lambda row: row.name)] == [
        entry[2] for _, entry in sorted(GOLDEN[kind].items())
    ]


def train(model: nn.Module, optimizer: steepest.Optimizer) -> None:
    model().square().mean().backward()
    optimizer.step()
