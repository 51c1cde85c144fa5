"""The sgd_sai package: the same trajectories wherever it is sound (it prints; that is swallowed)."""

import pytest
import torch
from sgd_sai import SGD_sai as Peer

from peers import STEPS, Nearness, fresh_gradients, fresh_params, take
from steepest import SGDSaI, compat


def pairs(make, options, steps=STEPS, select=slice(3)):
    """Ours and theirs on all but the one-element tensor, whose scale of 1e8 is a fault of theirs."""
    params, expected = fresh_params()[select], fresh_params()[select]
    ours, theirs = make(params, **options), Peer(expected, **options)
    for gradients in fresh_gradients(steps):
        take(params, ours, gradients[select])
        take(expected, theirs, gradients[select])
        yield ours, theirs, params, expected


@pytest.mark.parametrize("make", [SGDSaI, compat.SGD_sai])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 1e-3},
        {"lr": 1e-2, "momentum": 0.5, "weight_decay": 0.0},
        {"lr": 1e-3, "eps": 1e-2, "weight_decay": 0.5},
    ],
)
def test_the_same_trajectory(make, options):
    near = Nearness()
    for ours, theirs, params, expected in pairs(make, options):
        for i, (param, other) in enumerate(zip(params, expected, strict=True)):
            near(f"parameter {i}", param, other)
            for name in ("momentum_buffer", "gsnr"):
                near(f"{name} of parameter {i}", ours.state[param][name], theirs.state[other][name])


def test_its_one_element_tensors_explode_and_ours_do_not():
    for ours, theirs, params, expected in pairs(SGDSaI, {"lr": 1e-3}, steps=1, select=slice(3, 4)):
        assert theirs.state[expected[0]]["gsnr"].item() > 1e6
        assert float(expected[0].detach().abs()) > 100
        assert ours.state[params[0]]["gsnr"].item() == 10
        assert float(params[0].detach().abs()) < 10


def test_signature_is_the_originals():
    params = fresh_params()
    ours = compat.SGD_sai(params, 0.1, 0.8, 1e-6, 0.2)
    theirs = Peer(params, 0.1, 0.8, 1e-6, 0.2)
    for name, value in theirs.defaults.items():
        assert ours.defaults[name] == value
    for name, value in Peer(params).defaults.items():
        assert compat.SGD_sai(params).defaults[name] == value
    assert {"lr", "momentum", "eps", "weight_decay"} == set(theirs.defaults)


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"momentum": 1.0}, {"eps": -1e-8}, {"weight_decay": -0.1}])
def test_what_it_refuses_is_refused(bad):
    for make in (Peer, compat.SGD_sai):
        with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
            make(fresh_params(), **bad)


def test_its_explicit_warmup_is_harmless(capsys):
    params, expected = fresh_params()[:3], fresh_params()[:3]
    ours, theirs = compat.SGD_sai(params, lr=1e-3), Peer(expected, lr=1e-3)
    assert not ours.has_warmup
    for t, gradients in enumerate(fresh_gradients(10)):
        for tensors, optimizer in ((params, ours), (expected, theirs)):
            for param, gradient in zip(tensors, gradients[:3], strict=True):
                param.grad = gradient.clone()
            if t == 0:
                capsys.readouterr()
                optimizer.warmup_step()
                assert (capsys.readouterr().out == "") == (optimizer is ours)
            optimizer.step()
    assert ours.has_warmup
    near = Nearness()
    for i, (param, other) in enumerate(zip(params, expected, strict=True)):
        near(f"parameter {i}", param, other)


def test_the_gradient_is_left_alone():
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = compat.SGD_sai([param])
    gradient = torch.arange(5.0)
    param.grad = gradient.clone()
    optimizer.step()
    param.grad.add_(1)  # must not reach into the momentum
    assert torch.equal(optimizer.state[param]["momentum_buffer"], gradient)
