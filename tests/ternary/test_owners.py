"""Which trainer a layer belongs to: the last one, whatever is copied, wrapped, moved or loaded."""

import copy
import gc
import pickle

import pytest
import torch

from steepest.ternary import TernaryFlip, targets

from .models import (
    accumulators,
    assert_same,
    has_votes,
    loss_of,
    pending,
    small_model,
    snapshot,
    train,
)


def test_the_last_trainer_owns_the_layers_and_the_first_says_so():
    model = small_model()
    first = TernaryFlip(model)
    second = TernaryFlip(model)
    loss_of(model, 0).backward()
    assert not has_votes(first)
    assert has_votes(second)
    with pytest.raises(RuntimeError, match="layer '0' belongs to another TernaryFlip"):
        first.step()


def test_a_trainer_that_is_gone_takes_no_votes():
    model = small_model()
    trainer = TernaryFlip(model)
    del trainer
    gc.collect()
    loss_of(model, 0).backward()
    assert model[4].weight.grad is not None


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_train_on_alike_and_apart(way):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = TernaryFlip(model, 2, votes="magnitude")
    train(model, optimizer, trainer, 3)
    loss_of(model, 50).backward()
    if way == "deepcopy":
        twin, twin_trainer = copy.deepcopy((model, trainer))
    else:
        twin, twin_trainer = pickle.loads(pickle.dumps((model, trainer)))
    trainer.step()
    assert not torch.equal(model[0].packed, twin[0].packed)
    twin_trainer.step()
    assert_same(snapshot(twin), snapshot(model))
    loss_of(model, 51).backward()
    loss_of(twin, 51).backward()
    for one, other in zip(pending(trainer), pending(twin_trainer), strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


def test_a_copy_of_the_model_alone_votes_nowhere():
    model = small_model()
    trainer = TernaryFlip(model)
    loss_of(copy.deepcopy(model), 0).backward()
    assert not has_votes(trainer)


def test_a_compiled_or_wrapped_model_has_the_same_layers():
    model = small_model()
    assert list(TernaryFlip(torch.compile(model)).targets.layers) == ["0", "3"]


def test_votes_and_counters_of_a_layer_that_moves_go_with_it(monkeypatch):
    # No second device here: the meta device stands for it, which cannot compute flips.
    model = small_model()
    trainer = TernaryFlip(model)
    loss_of(model, 0).backward()
    trainer.step()
    loss_of(model, 1).backward()
    moved = []

    def flip(packed, a, votes, **options):
        moved.append((packed.device.type, a.device.type, votes.device.type))
        return torch.zeros((), dtype=torch.int64)

    monkeypatch.setattr(targets, "flip_layer", flip)
    model[0].packed = model[0].packed.to("meta")
    trainer.step()
    assert moved == [("meta",) * 3, ("cpu",) * 3]
    assert accumulators(trainer)["0"].device.type == "meta"
    vote_buffer = trainer.targets.buffers["0"]
    for where in ("cpu", "meta"):
        vote_buffer.begin_pass((13, 6), torch.device(where))
    assert vote_buffer.pending.device.type == "meta"
    assert vote_buffer.passes == 2


def test_loading_does_not_take_layers_back_from_a_later_trainer():
    model = small_model()
    first = TernaryFlip(model, 4)
    saved = first.state_dict()
    second = TernaryFlip(model, 4)
    with pytest.raises(RuntimeError, match="layer '0' belongs to another TernaryFlip"):
        first.load_state_dict(saved)
    loss_of(model, 0).backward()
    assert has_votes(second)
    second.step()
