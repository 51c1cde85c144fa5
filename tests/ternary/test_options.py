"""Options of the trainer, also those that change between steps."""

import copy

import pytest
import torch

from steepest.compile import available
from steepest.ternary import TernaryFlip, TernaryLinear, chunks, planes

from .models import (
    accumulators,
    assert_same,
    loss_of,
    mixed_model,
    pending,
    small_model,
    snapshot,
    taken,
    train,
)


@pytest.mark.parametrize(("share", "flips"), [(1.0, 288), (0.5, 144), (0.1, 28), (1e-3, 1), (0.0, 0)])
def test_the_largest_part_that_may_flip_is_one_weight_at_least(share, flips):
    layer = TernaryLinear(9, 32)
    layer.set_ternary(torch.zeros(32, 9))
    layer.scale.data.fill_(1.0)
    trainer = TernaryFlip(layer, 1, max_flip_fraction=share)
    layer(torch.ones(1, 9)).sum().backward()
    trainer.step()
    assert trainer.stats().flips == flips


def test_a_schedule_is_asked_once_a_step():
    asked = []

    def schedule(step):
        asked.append(step)
        return 2.0

    model = small_model()
    train(model, torch.optim.SGD(model.parameters()), TernaryFlip(model, schedule=schedule), 3)
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("votes", ["sign", "magnitude"])
def test_the_pull_toward_zero_is_handed_on(votes):
    layer = TernaryLinear(4, 3)
    layer.set_ternary(torch.tensor([[1, -1, 0, 1]] * 3))
    trainer = TernaryFlip(layer, 100, votes=votes, zero_pull=1.0)
    layer(torch.zeros(1, 4)).sum().backward()
    trainer.step()
    assert torch.equal(accumulators(trainer)[""], -layer.unpack())


def test_outward_votes_by_magnitude_are_dropped():
    layer = TernaryLinear(3, 1, bias=False)
    layer.set_ternary(torch.tensor([[1, -1, 0]]))
    layer.scale.data.fill_(1.0)
    trainer = TernaryFlip(layer, votes="magnitude", outward="drop")
    layer(torch.tensor([[-1.0, 1.0, -1.0]])).sum().backward()
    assert pending(trainer)[0].tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"threshold": -1.0}, "threshold must be"),
        ({"votes": "size"}, "'size'"),
        ({"accumulator": torch.int16}, "accumulator was torch.int8 .* cannot become torch.int16"),
        ({"schedule": "custom"}, "needs the function"),
        ({"schedule": "annealed"}, "needs total_steps"),
    ],
)
@pytest.mark.parametrize("when", ["before backward", "before step"])
def test_invalid_option_changes_are_refused_before_anything_changes(change, says, when):
    model = small_model()
    trainer = TernaryFlip(model, 2)
    train(model, torch.optim.SGD(model.parameters()), trainer, 3)
    options = dict(trainer.param_groups[0])
    before, state = snapshot(model), copy.deepcopy(accumulators(trainer))
    if when == "before step":
        loss_of(model, 3).backward()
        trainer.param_groups[0].update(change)
    else:
        trainer.param_groups[0].update(change)

    def go_on():
        if when == "before backward":
            loss_of(model, 3).backward()
        trainer.step()

    with pytest.raises((ValueError, TypeError), match=says):
        go_on()
    assert_same(snapshot(model), before)
    assert_same(accumulators(trainer), state)
    assert taken(trainer) == 3
    # Mended, the step can be taken.
    trainer.param_groups[0].clear()
    trainer.param_groups[0].update(options)
    trainer.zero_grad()
    loss_of(model, 3).backward()
    trainer.step()
    assert taken(trainer) == 4


def test_options_changed_between_steps_are_those_of_the_next():
    found = []
    for changed in (False, True):
        model = small_model()
        trainer = TernaryFlip(model, 5 if changed else 2, votes="sign" if changed else "magnitude")
        trainer.param_groups[0].update(votes="magnitude", threshold=2.0)
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), trainer, 4)
        assert trainer.stats().total_flips > 0
        found.append(snapshot(model))
    assert_same(*found)


def test_compile_may_be_changed_between_steps(monkeypatch):
    asked = []

    def eagerly(key, function, arguments, doing, trial=None):
        asked.append(function.__name__)
        return function(*arguments)

    monkeypatch.setattr(available, "compiler_available", lambda kind: True)
    for module in (chunks, planes):
        monkeypatch.setattr(module, "run_dynamic", eagerly)
    layer = TernaryLinear(64, 8)
    trainer = TernaryFlip(layer, votes="magnitude")
    found = []
    for option in (None, True, False):
        trainer.param_groups[0]["compile"] = option
        layer(torch.randn(2, 64)).square().sum().backward()
        trainer.step()
        found.append(list(asked))
        asked.clear()
    assert found == [[], ["_add", "sweep"], []]


def test_binary_layers_are_never_zero_and_a_pull_there_is_refused():
    model = mixed_model()
    trainer = TernaryFlip(model, 1)
    train(model, torch.optim.SGD(model.parameters(), lr=0.0), trainer, 3)
    ternary, binary = trainer.stats().layers
    assert ternary.zeros > 0
    assert (binary.zeros, binary.weights) == (0, 91)
    assert binary.flips > 0
    assert trainer.stats().zeros == ternary.zeros * 78 / 169
    before = snapshot(model)
    trainer.param_groups[0]["zero_pull"] = 0.5
    loss_of(model, 3).backward()
    with pytest.raises(ValueError, match="layer '3' is binary"):
        trainer.step()
    good = TernaryFlip(small_model(), zero_pull=0.5).state_dict()
    with pytest.raises(ValueError, match=r"layer '3' is binary.*nothing was loaded"):
        trainer.load_state_dict(good)
    assert_same(snapshot(model), before)
