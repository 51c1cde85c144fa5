"""Steps that fail halfway can be tried again."""

import pytest

from steepest.ternary import TernaryFlip

from .models import (
    accumulators,
    assert_same,
    loss_of,
    small_model,
    snapshot,
)


def test_a_step_that_failed_can_be_tried_again(monkeypatch):
    found = []
    for fails in (False, True):
        model, asked = small_model(), []

        def schedule(step, asked=asked, fails=fails):
            asked.append(step)
            if fails and len(asked) == 1:
                raise OSError("no schedule today")
            return 2.0

        trainer = TernaryFlip(model, schedule=schedule)
        loss_of(model, 0).backward()
        if fails:
            with pytest.raises(OSError, match="today"):
                trainer.step()
        trainer.step()
        found.append({**snapshot(model), **accumulators(trainer)})
    assert_same(*found)


def failing_in(layer, function):
    def sum_of(name, group):
        if name == layer:
            raise OSError("no room")
        return function(name, group)

    return sum_of


def test_a_retried_step_does_not_repeat_layers_that_were_stepped(monkeypatch):
    found = []
    for fails in (False, True):
        model = small_model()
        trainer = TernaryFlip(model, 100)
        loss_of(model, 0).backward()
        if fails:
            with monkeypatch.context() as patch:
                patch.setattr(trainer.targets, "_sum", failing_in("3", trainer.targets._sum))
                with pytest.raises(OSError, match="no room"):
                    trainer.step()
        trainer.step()
        assert accumulators(trainer)["0"].any()
        found.append({"a": accumulators(trainer)["0"], "packed": model[0].packed})
    assert_same(*found)
