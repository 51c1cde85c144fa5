"""lion_pytorch: the same trajectories."""

import pytest
import torch
from lion_pytorch import Lion as Peer

from peers import STEPS, Nearness, fresh_gradients, fresh_params, take
from steepest import Lion, Simba


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.3},
        {"betas": (0.95, 0.98), "weight_decay": 0.1},
        {"betas": (0.5, 0.9)},
    ],
)
@pytest.mark.parametrize(
    "make", [Lion, lambda params, **options: Simba(params, memory="momentum", choice="lion", **options)]
)
def test_the_same_trajectory(make, options):
    params, expected = fresh_params(), fresh_params()
    ours, theirs = make(params, lr=1e-2, **options), Peer(expected, lr=1e-2, **options)
    near = Nearness()
    for gradients in fresh_gradients(STEPS):
        take(params, ours, gradients)
        take(expected, theirs, gradients)
        for i, (param, other) in enumerate(zip(params, expected, strict=True)):
            near(f"parameter {i}", param, other)
            near(f"momentum {i}", ours.state[param]["exp_avg"], theirs.state[other]["exp_avg"])


def test_independent_decay_is_its_decoupled_decay():
    # lion_pytorch divides λ by the initial learning rate.
    params, expected = fresh_params(), fresh_params()
    ours = Lion(params, lr=1e-2, weight_decay=0.02, weight_decay_method="independent")
    theirs = Peer(expected, lr=1e-2, weight_decay=0.02, decoupled_weight_decay=True)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.97) for o in (ours, theirs)]
    near = Nearness()
    for gradients in fresh_gradients(STEPS):
        take(params, ours, gradients)
        take(expected, theirs, gradients)
        for schedule in schedules:
            schedule.step()
        for i, (param, other) in enumerate(zip(params, expected, strict=True)):
            near(f"parameter {i}", param, other)


def test_its_checkpoint_goes_on_here():
    expected = fresh_params()
    theirs = Peer(expected, lr=1e-2, weight_decay=0.1)
    gradients = list(fresh_gradients(STEPS))
    for step in gradients[:20]:
        take(expected, theirs, step)
    params = [torch.nn.Parameter(p.detach().clone()) for p in expected]
    ours = Lion(params)
    ours.load_state_dict(theirs.state_dict())
    near = Nearness()
    for step in gradients[20:]:
        take(params, ours, step)
        take(expected, theirs, step)
        for i, (param, other) in enumerate(zip(params, expected, strict=True)):
            near(f"parameter {i}", param, other)
