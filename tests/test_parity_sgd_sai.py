"""The sgd_sai package: the same trajectories wherever it is sound (it prints; that is swallowed)."""

import copy
import pickle

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
        assert ours.state[params[0]]["gsnr"].item() == 1
        assert float(params[0].detach().abs()) < 1


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


class Pair:
    """Both packages' SGD_sai on equal parameters, without the one-element tensor; each call goes to both."""

    def __init__(self, **options):
        self.params, self.expected = fresh_params()[:3], fresh_params()[:3]
        self.ours, self.theirs = compat.SGD_sai(self.params, **options), Peer(self.expected, **options)
        self.near = Nearness()

    def sides(self):
        return ((self.params, self.ours), (self.expected, self.theirs))

    def give(self, gradients):
        for tensors, _ in self.sides():
            for param, gradient in zip(tensors, gradients[:3], strict=True):
                param.grad = gradient.clone()

    def warm_up(self):
        for _, optimizer in self.sides():
            optimizer.warmup_step()

    def step(self):
        for _, optimizer in self.sides():
            optimizer.step()

    def compare(self):
        """Parameters, G and momentum agree as far as the original has them."""
        assert self.ours.has_warmup == self.theirs.has_warmup
        for i, (param, other) in enumerate(zip(self.params, self.expected, strict=True)):
            self.near(f"parameter {i}", param, other)
            for name, value in self.theirs.state[other].items():
                self.near(f"{name} of parameter {i}", self.ours.state[param][name], value)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}, {"momentum": 0.5}])
@pytest.mark.parametrize("before", [0, 4])
@pytest.mark.parametrize("same", [True, False], ids=["the step's gradients", "other gradients"])
def test_warmup_step_measures_the_gradients_that_there_are(same, before, options):
    """Also in the middle of a run, where the momentum goes on; a step is not taken."""
    pair = Pair(lr=1e-3, **options)
    gradients = list(fresh_gradients(20))
    for step in gradients[:before]:
        pair.give(step)
        pair.step()
    begun = [param.detach().clone() for param in pair.params]
    pair.give([5 * g + g.abs().mean() for g in gradients[7]])
    pair.warm_up()
    assert pair.ours.has_warmup
    pair.compare()
    assert all(torch.equal(param, old) for param, old in zip(pair.params, begun, strict=True))
    for t, step in enumerate(gradients[before:]):
        if not (same and t == 0):
            pair.give(step)
        pair.step()
        pair.compare()


def test_warmup_step_prints_nothing_and_calls_the_closure_once_with_gradients(capsys):
    param = torch.nn.Parameter(torch.tensor([1.0, 2.0, 4.0]))
    optimizer = compat.SGD_sai([param])
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = param.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.warmup_step(closure)) == 21
    assert calls == [True]
    assert optimizer.state[param]["gsnr"].item() == pytest.approx(float(param.grad.norm() / param.grad.std()))
    assert param.tolist() == [1.0, 2.0, 4.0]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("way", ["checkpoint", "deepcopy", "pickle"])
def test_what_was_measured_ahead_survives(way):
    pair = Pair(lr=1e-3)
    gradients = list(fresh_gradients(10))
    pair.give(gradients[0])
    pair.warm_up()
    if way == "checkpoint":
        again = compat.SGD_sai(pair.params, lr=1e-3)
        again.load_state_dict(pair.ours.state_dict())
    else:
        again = copy.deepcopy(pair.ours) if way == "deepcopy" else pickle.loads(pickle.dumps(pair.ours))
        pair.params = again.param_groups[0]["params"]
    pair.ours = again
    assert again.has_warmup
    for step in gradients[1:]:
        pair.give(step)
        pair.step()
        pair.compare()


def test_a_tensor_without_a_usable_gradient_is_measured_in_a_later_step():
    """The original raises KeyError, and freezes the tensor whose gradient is zero."""
    params = fresh_params()[:3]
    optimizer = compat.SGD_sai(params, lr=1e-3)
    twins = fresh_params()[:3]
    twin = compat.SGD_sai(twins, lr=1e-3)
    gradients = [each[:3] for each in fresh_gradients(6)]
    params[0].grad, params[1].grad = gradients[0][0].clone(), torch.zeros_like(params[1])
    optimizer.warmup_step()
    assert "gsnr" not in optimizer.state.get(params[2], {})
    assert float(optimizer.state.get(params[1], {}).get("measured", 0)) == 0
    for step in gradients:
        take(params, optimizer, step)
        take(twins, twin, step)
    assert all(torch.equal(param, other) for param, other in zip(params, twins, strict=True))


@pytest.mark.parametrize("first", ["load", "set"])
def test_a_resume_that_sets_has_warmup_goes_on_with_the_saved_scales(first):
    """What users of the original do, since its checkpoints forget that G was measured."""
    pair = Pair(lr=1e-3)
    gradients = list(fresh_gradients(20))
    for step in gradients[:8]:
        pair.give(step)
        pair.step()
    resumed = []
    for (params, optimizer), make in zip(pair.sides(), (compat.SGD_sai, Peer), strict=True):
        again = make(params, lr=1e-3)
        if first == "set":
            again.has_warmup = True
            assert again.has_warmup
        again.load_state_dict(optimizer.state_dict())
        again.has_warmup = True
        resumed.append(again)
    pair.ours, pair.theirs = resumed
    for step in gradients[8:]:
        pair.give([g + g.abs().mean() for g in step])
        pair.step()
        pair.compare()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}])
def test_has_warmup_false_has_the_next_step_measure_anew(options):
    pair = Pair(lr=1e-3, **options)
    gradients = list(fresh_gradients(20))
    for t, step in enumerate(gradients):
        if t == 8:
            pair.ours.has_warmup = pair.theirs.has_warmup = False
            assert not pair.ours.has_warmup
        pair.give([g + 0.1 * t * g.abs().mean() for g in step])
        pair.step()
        pair.compare()


@pytest.mark.parametrize(("before", "values"), [(0, [True, False]), (4, [True, False]), (4, [False, True])])
def test_what_has_warmup_was_set_to_last_counts(before, values):
    """Also after warmup_step(); where no step was taken yet, the momentum begins with the first."""
    pair = Pair(lr=1e-3)
    gradients = list(fresh_gradients(20))
    for step in gradients[:before]:
        pair.give(step)
        pair.step()
    pair.give([g + g.abs().mean() for g in gradients[7]])
    pair.warm_up()
    for value in values:
        pair.ours.has_warmup = pair.theirs.has_warmup = value
        assert pair.ours.has_warmup == value
    for step in gradients[before:]:
        pair.give(step)
        pair.step()
        pair.compare()


def test_scales_to_be_measured_anew_hold_until_a_gradient_can_be_measured():
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = compat.SGD_sai([param], lr=1.0, momentum=0.5, weight_decay=0.0)
    take([param], optimizer, [torch.tensor([1.0, 2.0, 3.0, 4.0])])
    scale = optimizer.state[param]["gsnr"].item()
    momentum = optimizer.state[param]["momentum_buffer"].clone()
    optimizer.has_warmup = False
    before = param.detach().clone()
    take([param], optimizer, [torch.zeros(4)])
    torch.testing.assert_close(param.detach(), before - scale * momentum / 2)
    assert optimizer.state[param]["gsnr"].item() == scale
    assert not optimizer.has_warmup
    take([param], optimizer, [torch.tensor([1.0, 1.0, 1.0, 9.0])])
    assert optimizer.has_warmup
    assert optimizer.state[param]["gsnr"].item() != scale


def test_the_gradient_is_left_alone():
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = compat.SGD_sai([param])
    gradient = torch.arange(5.0)
    param.grad = gradient.clone()
    optimizer.step()
    param.grad.add_(1)  # must not reach into the momentum
    assert torch.equal(optimizer.state[param]["momentum_buffer"], gradient)
