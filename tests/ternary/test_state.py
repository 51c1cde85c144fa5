"""The trainer's state: its bytes, resuming from it, and the forms in which older versions saved it."""

import copy
import io

import pytest
import torch
from torch import nn

from steepest.rules.ternary_flip import TernaryFlipRule
from steepest.ternary import BinaryLinear, TernaryFlip, TernaryLinear

from .models import (
    accumulators,
    assert_same,
    loss_of,
    mixed_model,
    small_model,
    snapshot,
    taken,
    train,
)


@pytest.mark.parametrize("votes", ["sign", "magnitude"])
@pytest.mark.parametrize("accumulator", [torch.int8, torch.int16])
@pytest.mark.parametrize("make", [small_model, mixed_model])
def test_resuming_is_never_having_stopped(make, votes, accumulator):
    options = {
        "threshold": 4, "votes": votes, "accumulator": accumulator, "schedule": "annealed",
        "total_steps": 30, "zero_pull": 0.05 if make is small_model else 0.0, "max_flip_fraction": 0.2,
        "seed": 3,
    }  # fmt: skip
    model = make()
    optimizer, trainer = torch.optim.AdamW(model.parameters(), lr=0.01), TernaryFlip(model, **options)
    train(model, optimizer, trainer, 10)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), trainer.state_dict()], file)
    train(model, optimizer, trainer, 10, first=10)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = make(seed=77)
    # Made with other options: the saved ones count.
    resumed = torch.optim.AdamW(other.parameters(), lr=0.5), TernaryFlip(other, 100, seed=9)
    for each, state in zip((other, *resumed), saved, strict=True):
        each.load_state_dict(state)
    train(other, *resumed, 10, first=10)
    assert_same(snapshot(other), snapshot(model))
    assert_same(accumulators(resumed[1]), accumulators(trainer))
    assert any(a.any() for a in accumulators(trainer).values())
    assert resumed[1].stats().threshold == trainer.stats().threshold
    # In place: what was saved is not what trains.
    for kept, a in zip(saved[2]["state"].values(), accumulators(trainer).values(), strict=True):
        assert kept["step"] == 10
        assert not torch.equal(kept["accumulator"], a)


def test_state_that_does_not_fit_is_refused_and_nothing_is_loaded():
    model = small_model()
    trainer = TernaryFlip(model, 4)
    train(model, torch.optim.SGD(model.parameters(), lr=0.0), trainer, 2)
    before = copy.deepcopy(accumulators(trainer))
    wide = small_model()
    other = TernaryFlip(wide, 4, accumulator=torch.int16)
    train(wide, torch.optim.SGD(wide.parameters(), lr=0.0), other, 2)
    good = other.state_dict()

    def with_state(index, **changes):
        return {**good, "state": {**good["state"], index: {**good["state"][index], **changes}}}

    def with_options(**changes):
        return {**good, "param_groups": [{**good["param_groups"][0], **changes}]}

    for bad, says in (
        (with_state(1, accumulator=torch.zeros(2, 2, dtype=torch.int16)), r"'3.votes' has shape \(2, 2\)"),
        (with_state(1, accumulator=[]), "'3.votes' is a list"),
        (with_options(accumulator=torch.int8), "'0.votes' has dtype torch.int16"),
        (with_options(threshold=-1.0), "threshold must be"),
        (with_options(schedule="custom"), r"schedule=\.\.\..*nothing was loaded"),
        (TernaryFlip(nn.Sequential(small_model()[0]), 4).state_dict(), "doesn't match the size"),
    ):
        with pytest.raises(ValueError, match=says):
            trainer.load_state_dict(bad)
        assert_same(accumulators(trainer), before)
        assert trainer.param_groups[0]["threshold"] == 4
    trainer.load_state_dict(good)
    assert accumulators(trainer)["0"].dtype == torch.int16


def stepped(model, trainer):
    model(torch.randn(1, 256)).sum().backward()
    trainer.step()
    return trainer


def test_the_state_is_a_byte_a_weight():
    model = nn.Sequential(TernaryLinear(256, 256), TernaryLinear(256, 128))
    trainer = TernaryFlip(model)
    weights = trainer.stats().weights
    packed = sum(layer.packed.numel() for layer in model)
    assert packed + stepped(model, trainer).state_bytes() <= 1.26 * weights
    assert stepped(model, TernaryFlip(model, accumulator=torch.int16)).state_bytes() == 2 * weights + 16
    binary = nn.Sequential(BinaryLinear(256, 256), BinaryLinear(256, 128))
    packed = sum(layer.packed.numel() for layer in binary)
    assert packed * 8 == weights
    assert packed + stepped(binary, TernaryFlip(binary)).state_bytes() <= 1.13 * weights


def test_transposed_counters_are_loaded():
    found = []
    for turned in (False, True):
        model = small_model()
        trainer = TernaryFlip(model, 4, max_flip_fraction=0.1)
        loss_of(model, 1).backward()
        trainer.step()
        state = copy.deepcopy(trainer.state_dict())
        generator = torch.Generator().manual_seed(0)
        for entries in state["state"].values():
            a = entries["accumulator"].random_(-9, 10, generator=generator)
            entries["accumulator"] = a.t().contiguous().t() if turned else a
        trainer.load_state_dict(state)
        loss_of(model, 0).backward()
        trainer.step()
        found.append({**snapshot(model), **accumulators(trainer)})
    assert_same(*found)


@pytest.mark.parametrize("turned", [False, True])
def test_checkpoints_of_the_first_releases_load(turned):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = TernaryFlip(model, 2, votes="magnitude", seed=3, max_flip_fraction=0.1)
    train(model, optimizer, trainer, 3)
    options = {*TernaryFlipRule.hyper, "nonfinite", "compile", "seed"} - {"lr", "weight_decay"}
    saved = copy.deepcopy(accumulators(trainer))
    old = {
        "step": 3,
        "options": {name: trainer.param_groups[0][name] for name in options},
        "accumulators": dict(reversed(saved.items())) if turned else saved,
    }
    twin = copy.deepcopy(model)
    resumed = TernaryFlip(twin, 100, seed=9)
    resumed.load_state_dict(old)
    train(model, optimizer, trainer, 4, first=3)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.01), resumed, 4, first=3)
    assert_same(snapshot(twin), snapshot(model))
    assert_same(accumulators(resumed), accumulators(trainer))
    assert trainer.stats().flips > 0
    assert taken(resumed) == 7
    with pytest.raises(ValueError, match="other ternary layers: '3'; nothing was loaded"):
        resumed.load_state_dict({**old, "accumulators": {"0": saved["0"]}})
    assert taken(resumed) == 7
