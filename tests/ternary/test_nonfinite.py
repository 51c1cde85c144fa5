"""Gradients that are infinite or NaN, and steps that a gradient scaler skips."""

import copy

import pytest
import torch

from steepest.ternary import TernaryFlip, TernaryLinear

from .models import (
    accumulators,
    assert_same,
    has_votes,
    loss_of,
    pending,
    small_model,
    snapshot,
    taken,
)


@pytest.mark.parametrize("votes", ["sign", "magnitude"])
def test_nonfinite_gradients_by_option(votes):
    def run(nonfinite):
        model = small_model()
        trainer = TernaryFlip(model, 2, votes=votes, nonfinite=nonfinite)
        for index in range(3):
            loss_of(model, index).backward()
            trainer.step()
        loss_of(model, 3).backward()
        good = [votes.clone() for votes in pending(trainer)]
        trainer.zero_grad()
        before = snapshot(model), copy.deepcopy(accumulators(trainer))
        x = torch.randn(4, 6)
        x[2, 1] = float("nan")
        loss_of(model, 3).backward()
        model[0](x).sum().backward()
        return model, trainer, before, good

    model, trainer, (weights, state), good = run("ignore")
    # The NaN's column takes no votes of that pass, by magnitude no weight of its layer does.
    first = pending(trainer)[0]
    assert torch.equal(first[:, 1], good[0][:, 1])
    assert torch.equal(first, good[0]) == (votes == "magnitude")
    trainer.step()
    assert taken(trainer) == 4

    model, trainer, (weights, state), _ = run("skip")
    trainer.step()
    assert trainer.skipped_steps == 1
    assert_same(snapshot(model), weights)
    assert_same(accumulators(trainer), state)
    assert taken(trainer) == 3
    assert not has_votes(trainer)

    model, trainer, (weights, state), _ = run("raise")
    with pytest.raises(FloatingPointError, match=r"gradient of parameter '0\.votes' has 1 infinite or NaN"):
        trainer.step()
    assert_same(snapshot(model), weights)
    assert_same(accumulators(trainer), state)
    assert taken(trainer) == 3


def test_grad_scalers_skipped_step_drops_its_votes():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = TernaryFlip(model, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = snapshot(model)
    for index, overflows in ((0, True), (1, False)):
        scale = torch.finfo(torch.float32).max if overflows else 1.0
        (scaler.scale(loss_of(model, index)) * scale).backward()
        scaler.unscale_(optimizer)
        found = sum(scaler._found_inf_per_device(optimizer).values())
        scaler.step(optimizer)
        if not found:
            trainer.step()
        scaler.update()
        for each in (optimizer, trainer):
            each.zero_grad()
        if overflows:
            assert_same(snapshot(model), before)
            assert not has_votes(trainer)
    assert trainer.stats().flips > 0


def test_a_bad_pass_is_remembered_when_a_good_one_follows():
    layer = TernaryLinear(4, 3)
    trainer = TernaryFlip(layer, 1, nonfinite="skip")
    before = layer.packed.clone()
    layer(torch.full((1, 4), float("nan"))).sum().backward()
    layer(torch.ones(1, 4)).sum().backward()
    trainer.step()
    assert trainer.skipped_steps == 1
    assert torch.equal(layer.packed, before)


@pytest.mark.parametrize(("size", "skips"), [(2.0**127, 0), (float("inf"), 1), (float("nan"), 1)])
def test_gradients_whose_sum_is_infinite_are_finite(size, skips):
    layer = TernaryLinear(4, 3, bias=False)
    layer.scale.data.fill_(1.0)
    trainer = TernaryFlip(layer, 1, nonfinite="skip")
    layer(torch.ones(1, 4)).backward(torch.full((1, 3), size))
    trainer.step()
    assert trainer.skipped_steps == skips
