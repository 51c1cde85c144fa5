"""Which passes through a layer vote, and how votes add up until a step."""

import contextlib
import threading

import pytest
import torch

from steepest.ternary import TernaryFlip, TernaryLinear
from steepest.ternary.vote_buffer import VoteBuffer

from .models import (
    accumulators,
    has_votes,
    loss_of,
    mixed_model,
    pending,
    small_model,
    snapshot,
    taken,
)


def test_votes_of_micro_batches_add_up():
    model = small_model()
    trainer = TernaryFlip(model, 3)
    apart = []
    for index in range(3):
        loss_of(model, index).backward()
        apart.append(pending(trainer))
        trainer.zero_grad()
    for index in range(3):
        loss_of(model, index).backward()
    for layer, total in enumerate(pending(trainer)):
        assert torch.equal(total, sum(each[layer] for each in apart))
        assert total.abs().max() == 3


def test_more_votes_than_a_byte_holds_are_counted():
    layer = TernaryLinear(2, 1, bias=False)
    layer.set_ternary(torch.zeros(1, 2))
    layer.scale.data.fill_(1.0)
    trainer = TernaryFlip(layer, 300, accumulator=torch.int16)
    for count in range(1, 201):
        layer(torch.tensor([[1.0, -1.0]])).sum().backward()
        assert pending(trainer)[0].tolist() == [[-count, count]]
    assert pending(trainer)[0].dtype == torch.int16
    trainer.step()
    assert accumulators(trainer)[""].tolist() == [[-200, 200]]


def test_the_pull_toward_zero_has_room_beside_the_most_votes_of_a_byte():
    layer = TernaryLinear(1, 1, bias=False)
    layer.set_ternary(torch.tensor([[-1]]))
    layer.scale.data.fill_(1.0)
    trainer = TernaryFlip(layer, 1000, accumulator=torch.int16, zero_pull=1.0)
    for _ in range(127):
        layer(torch.full((1, 1), -1.0)).sum().backward()
    trainer.step()
    assert accumulators(trainer)[""].item() == 128


def test_passes_in_several_threads_vote_one_after_the_other(monkeypatch):
    found = []
    for threads in (1, 2):
        torch.manual_seed(0)
        layer = TernaryLinear(16, 16)
        trainer = TernaryFlip(layer, votes="magnitude")
        x, cast = torch.randn(4, 16), VoteBuffer.add
        # Both threads are between the count of a pass and its votes, if nothing keeps one of them out.
        meeting = threading.Barrier(threads)

        def late(*arguments, meeting=meeting, cast=cast):
            with contextlib.suppress(threading.BrokenBarrierError):
                meeting.wait(timeout=0.2)
            cast(*arguments)

        def passes(count=2 // threads, layer=layer, x=x):
            for _ in range(count):
                layer(x).square().sum().backward()

        monkeypatch.setattr(VoteBuffer, "add", late)
        running = [threading.Thread(target=passes) for _ in range(threads)]
        for each in running:
            each.start()
        for each in running:
            each.join()
        monkeypatch.undo()
        assert trainer.targets.buffers[""].passes == 2
        found.append(trainer.targets.buffers[""].pending)
    assert torch.equal(*found)


def test_votes_exist_between_backward_and_step_alone():
    model = small_model()
    trainer = TernaryFlip(model)
    assert pending(trainer) == [None, None]
    loss_of(model, 0).backward()
    assert all(votes.dtype == torch.int8 for votes in pending(trainer))
    trainer.step()
    assert pending(trainer) == [None, None]
    loss_of(model, 0).backward()
    trainer.zero_grad()
    assert pending(trainer) == [None, None]


def test_a_layer_without_votes_is_left_alone():
    model = small_model()
    trainer = TernaryFlip(model, 1, zero_pull=1.0)
    model[3](torch.randn(4, 13)).square().sum().backward()
    before = snapshot(model)
    trainer.step()
    assert torch.equal(model[0].packed, before["0.packed"])
    assert not torch.equal(model[3].packed, before["3.packed"])
    assert next(layer.flips for layer in trainer.stats().layers) == 0
    trainer.step()
    assert taken(trainer) == 2


def test_evaluation_and_inference_do_not_vote():
    model = small_model()
    trainer = TernaryFlip(model)
    model.eval()
    loss_of(model, 0).backward()
    model.train()
    with torch.no_grad():
        loss_of(model, 0)
    assert not has_votes(trainer)


def test_without_a_trainer_ternary_weights_stay():
    model = small_model()
    before = snapshot(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for index in range(3):
        loss_of(model, index).backward()
        optimizer.step()
    for name, value in snapshot(model).items():
        assert torch.equal(value, before[name]) == name.endswith(("packed", "votes", "_extra_state")), name


@pytest.mark.parametrize("make", [small_model, mixed_model])
def test_training_learns_more_than_the_float_parameters_can(make):
    def final(trained):
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        trainer = TernaryFlip(model, 8, schedule="annealed", total_steps=400) if trained else None
        for index in range(400):
            optimizer.zero_grad()
            loss_of(model, index, rows=32).backward()
            optimizer.step()
            if trainer is not None:
                trainer.step()
        model.eval()
        with torch.no_grad():
            return sum(loss_of(model, 5000 + index, rows=64).item() for index in range(10))

    assert final(trained=True) < 0.8 * final(trained=False)


def test_frozen_scales_and_inputs_without_gradient_keep_no_layer_from_voting():
    layer = TernaryLinear(4, 3, bias=False)
    layer.scale.requires_grad_(False)
    trainer = TernaryFlip(layer)
    layer(torch.randn(5, 4)).sum().backward()
    assert has_votes(trainer)
    assert layer.scale.grad is None


def test_a_layer_used_twice_votes_twice():
    layer = TernaryLinear(4, 4, bias=False)
    trainer = TernaryFlip(layer)
    layer(layer(torch.randn(5, 4))).sum().backward()
    assert trainer.targets.buffers[""].passes == 2
