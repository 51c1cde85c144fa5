"""torch's own SGD and AdamW: the same trajectories, and their checkpoints go on here."""

import pytest
import torch

from peers import STEPS, Nearness, fresh_gradients, fresh_params, take
from steepest import SGD, AdamW

SGD_OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.4},
    {"momentum": 0.9, "nesterov": True},
    {"weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1, "maximize": True},
    {"momentum": 0.7, "nesterov": True, "weight_decay": 0.1, "maximize": True},
]
ADAMW_OPTIONS = [
    {},
    {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1},
    {"weight_decay": 0.0},
    {"amsgrad": True},
    {"amsgrad": True, "weight_decay": 0.1, "maximize": True},
    {"maximize": True},
]
ALL = [(SGD, torch.optim.SGD, options) for options in SGD_OPTIONS]
ALL += [(AdamW, torch.optim.AdamW, options) for options in ADAMW_OPTIONS]


def compare(near, ours, theirs):
    (params, optimizer), (expected, peer) = ours, theirs
    for i, (param, other) in enumerate(zip(params, expected, strict=True)):
        near(f"parameter {i}", param, other)
        for name, value in peer.state[other].items():
            if value is not None:
                near(f"{name} of parameter {i}", optimizer.state[param][name], value)


@pytest.mark.parametrize(("make", "peer", "options"), ALL)
def test_the_same_trajectory(make, peer, options):
    params, expected = fresh_params(), fresh_params()
    ours = make(params, lr=1e-2, **options)
    theirs = peer(expected, lr=1e-2, foreach=False, **options)
    near = Nearness()
    for gradients in fresh_gradients(STEPS):
        take(params, ours, gradients)
        take(expected, theirs, gradients)
        compare(near, (params, ours), (expected, theirs))


@pytest.mark.parametrize(("make", "peer", "options"), ALL)
def test_in_float64_to_1e_13(make, peer, options):
    params, expected = ([torch.nn.Parameter(p.detach().double()) for p in fresh_params()] for _ in range(2))
    ours = make(params, lr=1e-2, **options)
    theirs = peer(expected, lr=1e-2, foreach=False, **options)
    near = Nearness(1e-13)
    for gradients in fresh_gradients(STEPS):
        take(params, ours, [g.double() for g in gradients])
        take(expected, theirs, [g.double() for g in gradients])
        compare(near, (params, ours), (expected, theirs))


@pytest.mark.parametrize(("make", "peer", "options"), ALL)
def test_torchs_checkpoint_goes_on_here(make, peer, options, tmp_path):
    expected = fresh_params()
    theirs = peer(expected, lr=1e-2, foreach=False, **options)
    gradients = list(fresh_gradients(STEPS))
    for step in gradients[:20]:
        take(expected, theirs, step)
    torch.save(theirs.state_dict(), tmp_path / "checkpoint.pt")

    params = [torch.nn.Parameter(p.detach().clone()) for p in expected]
    # Another learning rate and decay: what the checkpoint says must win.
    ours = make(params, lr=0.5, weight_decay=0.7)
    ours.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    near = Nearness()
    for step in gradients[20:]:
        take(params, ours, step)
        take(expected, theirs, step)
        compare(near, (params, ours), (expected, theirs))


@pytest.mark.parametrize(("make", "peer"), [(SGD, torch.optim.SGD), (AdamW, torch.optim.AdamW)])
def test_a_gradient_that_comes_later(make, peer):
    # Step counts are the parameter's own: bias correction and first momentum start with it.
    options = {"momentum": 0.9, "dampening": 0.4} if make is SGD else {}
    params, expected = fresh_params(), fresh_params()
    ours, theirs = make(params, lr=1e-2, **options), peer(expected, lr=1e-2, foreach=False, **options)
    near = Nearness()
    for t, gradients in enumerate(fresh_gradients(20)):
        for tensors, optimizer in ((params, ours), (expected, theirs)):
            for i, (param, gradient) in enumerate(zip(tensors, gradients, strict=True)):
                param.grad = None if i == 1 and (t < 5 or t == 12) else gradient.clone()
            optimizer.step()
        compare(near, (params, ours), (expected, theirs))


@pytest.mark.parametrize(("make", "peer"), [(SGD, torch.optim.SGD), (AdamW, torch.optim.AdamW)])
def test_under_a_scheduler(make, peer):
    params, expected = fresh_params(), fresh_params()
    ours, theirs = make(params, lr=1e-2), peer(expected, lr=1e-2, foreach=False)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS) for o in (ours, theirs)]
    for gradients in fresh_gradients(STEPS):
        take(params, ours, gradients)
        take(expected, theirs, gradients)
        for schedule in schedules:
            schedule.step()
    compare(Nearness(), (params, ours), (expected, theirs))


@pytest.mark.parametrize(("make", "peer"), [(SGD, torch.optim.SGD), (AdamW, torch.optim.AdamW)])
def test_defaults_are_torchs(make, peer):
    params = fresh_params()
    ours, theirs = make(params).defaults, peer(params).defaults
    for name in ours.keys() & theirs.keys():
        assert ours[name] == theirs[name], name
    assert {"lr", "weight_decay", "maximize"} <= ours.keys() & theirs.keys()
