"""State dicts of other optimizers go on here as there, or are refused by name; nothing is half taken."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sgd_sai import SGD_sai

import steepest
from steepest.linalg import newton_schulz
from steepest.migrations import SOURCES
from steepest.rule import find_rule


def stepped(make, shape=(3,)):
    weight = torch.nn.Parameter(torch.ones(shape))
    optimizer = make([weight])
    weight.grad = torch.full(shape, 0.5)
    optimizer.step()
    return weight, optimizer


def refused(optimizer, state_dict, words):
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(state_dict)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert str(after["state"]) == str(before["state"])


class Original(torch.optim.Optimizer):
    """Another library's optimizer, written from its equations, with its keys of groups and state."""

    def __init__(self, params, **defaults):
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, param.grad, self.state[param], SimpleNamespace(**group))


class OriginalSimba(Original):
    """Counters of signs, ``sign_counts``; the sign of a counter beyond ⌊wγ⌋, else of the gradient."""

    def update(self, p, g, state, o):
        counts = state.setdefault("sign_counts", torch.zeros_like(p, dtype=torch.int16))
        p.mul_(1 - o.lr * o.weight_decay)
        trusted = counts.abs() > int(o.window_size * o.threshold)
        p.sub_(o.lr * torch.where(trusted, counts.sign().to(g.dtype), g.sign()))
        counts.add_(g.sign().to(torch.int16)).clamp_(-o.window_size, o.window_size)


class Averaging(Original):
    """Emerging-Optimizers' OrthogonalizedOptimizer and Keller Jordan's Muon: an average, orthogonalized."""

    def update(self, p, g, state, o):
        beta = o.momentum_beta if hasattr(o, "momentum_beta") else o.momentum
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
        p.mul_(1 - o.lr * o.weight_decay)
        buffer.lerp_(g, 1 - beta)
        p.sub_(o.lr * newton_schulz(g.lerp(buffer, beta), method="svd"))


class AuxAdam(Original):
    """The Adam of Keller Jordan's MuonWithAuxAdam."""

    def update(self, p, g, state, o):
        if not state:
            state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p), step=0)
        state["step"] += 1
        state["exp_avg"].lerp_(g, 1 - o.betas[0])
        state["exp_avg_sq"].lerp_(g.square(), 1 - o.betas[1])
        first = state["exp_avg"] / (1 - o.betas[0] ** state["step"])
        second = state["exp_avg_sq"] / (1 - o.betas[1] ** state["step"])
        p.mul_(1 - o.lr * o.weight_decay).sub_(o.lr * first / (second.sqrt() + o.eps))


class EmergingSignum(Original):
    """Emerging-Optimizers' Signum: the sign of an average whose bias is corrected."""

    def update(self, p, g, state, o):
        if not state:
            state.update(exp_avg=torch.zeros_like(p), step=0)
        state["step"] += 1
        p.mul_(1 - o.lr * o.weight_decay)
        state["exp_avg"].lerp_(g, 1 - o.momentum)
        p.sub_(o.lr * (state["exp_avg"] / (1 - o.momentum ** state["step"])).sign())


class EmergingLion(Original):
    """Emerging-Optimizers' Lion, whose keys are the same here but for a step count."""

    def update(self, p, g, state, o):
        if not state:
            state.update(exp_avg=torch.zeros_like(p), step=0)
        state["step"] += 1
        p.mul_(1 - o.lr * o.weight_decay)
        p.sub_(o.lr * state["exp_avg"].lerp(g, 1 - o.betas[0]).sign())
        state["exp_avg"].lerp_(g, 1 - o.betas[1])


def signum_of_theirs(**options):
    flags = {"correct_bias": True, "nesterov": False, "use_shape_scaling": False, **options}
    return lambda ps: EmergingSignum(ps, lr=1e-2, momentum=0.8, weight_decay=0.1, **flags)


def averaging(**options):
    return lambda ps: Averaging(ps, lr=1e-2, weight_decay=0.1, **options)


def muon(params):
    """Ours with an exact polar factor, unscaled, as ``Averaging`` takes it; its momentum must give way."""
    return steepest.Muon(params, momentum=0.5, method="svd", scale="none")


def orthogonalized(params, **options):
    return steepest.OrthogonalizedOptimizer(
        params,
        momentum_beta=0.5,
        use_nesterov=True,
        scaled_orthogonalize_fn=lambda u: newton_schulz(u, method="svd"),
        **options,
    )


# name: (theirs, ours, our names of state -> theirs). Ours have other options: what the checkpoint says wins.
GOES_ON: dict[str, tuple[Any, Any, dict[str, str]]] = {
    "sgd_sai": (
        lambda ps: SGD_sai(ps, lr=3e-3, momentum=0.8, weight_decay=0.1),
        lambda ps: steepest.SGDSaI(ps, lr=0.5, momentum=0.1),
        {"gsnr": "gsnr", "momentum_buffer": "momentum_buffer"},
    ),
    "Simba": (
        lambda ps: OriginalSimba(ps, lr=1e-2, window_size=6, threshold=0.3, weight_decay=0.1),
        lambda ps: steepest.Simba(ps, lr=0.5, threshold=0.9),
        {"counts": "sign_counts"},
    ),
    "torch.optim.Muon": (
        lambda ps: torch.optim.Muon(ps, lr=1e-2, momentum=0.8, weight_decay=0.2),
        lambda ps: steepest.Muon(ps, ns_dtype=torch.float32, momentum=0.1),
        {"momentum_buffer": "momentum_buffer"},
    ),
    "torch.optim.Muon, other options": (
        lambda ps: torch.optim.Muon(
            ps,
            lr=1e-2,
            nesterov=False,
            ns_coefficients=(2.0, -1.5, 0.5),
            ns_steps=3,
            adjust_lr_fn="match_rms_adamw",
        ),
        lambda ps: steepest.Muon(ps, ns_dtype=torch.float32),
        {"momentum_buffer": "momentum_buffer"},
    ),
    "Keller Jordan's Muon": (averaging(momentum=0.9), muon, {"momentum_buffer": "momentum_buffer"}),
    "Keller Jordan's MuonWithAuxAdam": (
        averaging(momentum=0.9, use_muon=True),
        muon,
        {"momentum_buffer": "momentum_buffer"},
    ),
    "Keller Jordan's AuxAdam": (
        lambda ps: AuxAdam(ps, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, use_muon=False),
        steepest.AdamW,
        {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
    ),
    "Emerging-Optimizers, an option of a subclass": (
        averaging(momentum=0.9, qkv=[2, 2]),
        lambda ps: orthogonalized(ps, qkv=[1, 3]),
        {"momentum_buffer": "momentum_buffer"},
    ),
    "Emerging-Optimizers, with momentum_beta": (
        averaging(momentum_beta=0.9),
        orthogonalized,
        {"momentum_buffer": "momentum_buffer"},
    ),
    "Emerging-Optimizers, with momentum_beta, in Muon": (
        averaging(momentum_beta=0.9),
        muon,
        {"momentum_buffer": "momentum_buffer"},
    ),
    "Emerging-Optimizers' Signum": (
        signum_of_theirs(),
        steepest.Signum,
        {"momentum_buffer": "exp_avg"},
    ),
    "Emerging-Optimizers' Lion": (
        lambda ps: EmergingLion(ps, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95)),
        steepest.Lion,
        {"exp_avg": "exp_avg"},
    ),
}


@pytest.fixture
def exact_newton_schulz(monkeypatch):
    """torch.optim.Muon iterates in bfloat16 only, whose rounding the iteration amplifies."""
    monkeypatch.setattr(
        torch.optim._muon,
        "_zeropower_via_newtonschulz",
        lambda grad, triple, steps, eps: newton_schulz(grad, [triple], steps, dtype=torch.float32),
    )


def weights():
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in [(6, 4), (3, 5), (4, 4)]]


def gradients_of(params, step):
    draw = torch.Generator().manual_seed(step)
    return [(1 + step) * (torch.randn(param.shape, generator=draw) + 0.2) for param in params]


def take(optimizer, params, step):
    for param, gradient in zip(params, gradients_of(params, step), strict=True):
        param.grad = gradient.to(param.dtype)
    optimizer.step()


def through_a_file(tree):
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.usefixtures("exact_newton_schulz")
@pytest.mark.parametrize("unstepped", [0, 1])
@pytest.mark.parametrize("name", GOES_ON)
def test_it_goes_on_here_as_there(name, unstepped):
    make_theirs, make_ours, names = GOES_ON[name]
    expected = weights()
    theirs = make_theirs(expected)
    for step in range(6):
        take(theirs, expected[: 3 - unstepped], step)
    saved = through_a_file(theirs.state_dict())
    kept = copy.deepcopy(saved)
    params = [torch.nn.Parameter(param.detach().clone()) for param in expected]
    ours = make_ours(params)
    ours.load_state_dict(saved)
    assert str(saved) == str(kept), "the state dict that was given is as it was"
    for param, other in zip(params[: 3 - unstepped], expected, strict=False):
        for mine, its in names.items():
            found, given = ours.state[param][mine], theirs.state[other][its]
            assert torch.equal(found.double(), given.double()), mine
    # The original SGD-SaI never measures a tensor whose gradient comes later.
    going = params[: 3 - unstepped] if name == "sgd_sai" else params
    for step in range(6, 14):
        take(ours, going, step)
        take(theirs, expected[: len(going)], step)
        for param, other in zip(params, expected, strict=True):
            tolerance = 1e-6 * float(other.detach().abs().max())
            torch.testing.assert_close(param.detach(), other.detach(), rtol=0, atol=tolerance)
    again = make_ours(params)
    again.load_state_dict(through_a_file(ours.state_dict()))
    assert str(again.state_dict()) == str(ours.state_dict()), "what it has become loads too"


@pytest.mark.parametrize("name", GOES_ON)
def test_a_checkpoint_without_state_brings_the_options(name):
    make_theirs, make_ours, _ = GOES_ON[name]
    theirs, ours = make_theirs(weights()), make_ours(weights())
    ours.load_state_dict(theirs.state_dict())
    group, saved = ours.param_groups[0], theirs.param_groups[0]
    for option in ("lr", "weight_decay", "betas", "window_size", "threshold", "qkv", "nesterov", "ns_steps"):
        if option in saved and name != "Emerging-Optimizers' Signum":
            assert group[option] == saved[option], option
    momentum = saved.get("momentum", saved.get("momentum_beta"))
    assert group.get("momentum", group.get("momentum_beta")) == momentum
    assert group.keys() == make_ours(weights()).param_groups[0].keys()
    assert not ours.state_dict()["state"]


def saved_by(make, steps=3):
    param = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = make([param])
    for step in range(steps):
        take(optimizer, [param], step)
    return copy.deepcopy(optimizer.state_dict())


def sign_counts(value, dtype=torch.float32):
    def make(params):
        optimizer = OriginalSimba(params, lr=1e-2, window_size=6, threshold=0.3, weight_decay=0.1)
        optimizer.state[params[0]]["sign_counts"] = torch.full_like(params[0], value).to(dtype)
        return optimizer

    return saved_by(make, steps=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64])
@pytest.mark.parametrize("counter", [torch.int16, torch.int8])
def test_simbas_counters_become_integers_again(dtype, counter):
    """A resume by torch's own load_state_dict has cast them to the parameter's dtype."""
    param, ours = stepped(lambda ps: steepest.Simba(ps, window_size=6, counter_dtype=counter), (4, 4))
    ours.load_state_dict(sign_counts(-6, dtype))
    counts = ours.state[param]["counts"]
    assert counts.dtype == counter
    assert counts.unique().tolist() == [-6]


@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan")])
def test_a_scale_of_sgd_sais_that_moves_nothing_is_measured_anew(scale):
    """The original never moves a tensor whose first gradient was zero, such as LoRA's A."""
    saved = saved_by(lambda ps: SGD_sai(ps, weight_decay=0.0))
    saved["state"][0]["gsnr"] = torch.tensor(scale)
    param, ours = stepped(lambda ps: steepest.SGDSaI(ps, weight_decay=0.0), (4, 4))
    ours.load_state_dict(saved)
    assert float(ours.state[param]["measured"]) == 0
    before = param.detach().clone()
    take(ours, [param], 7)
    expected = param.grad.norm() / param.grad.std()
    torch.testing.assert_close(ours.state[param]["gsnr"], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(before - param.detach(), 1e-2 * expected * param.grad)


def test_sgd_sais_scales_of_half_precision_are_widened():
    param = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    theirs = SGD_sai([param])
    take(theirs, [param], 0)
    twin = torch.nn.Parameter(param.detach().clone())
    ours = steepest.SGDSaI([twin])
    ours.load_state_dict(theirs.state_dict())
    assert ours.state[twin]["gsnr"].dtype == torch.float32
    assert ours.state[twin]["gsnr"] == theirs.state[param]["gsnr"].float()
    assert ours.state[twin]["momentum_buffer"].dtype == torch.bfloat16


def without_entry(make, name):
    saved = saved_by(make)
    del saved["state"][0][name]
    return saved


# name: (the checkpoint, ours, words of the refusal)
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "counters that are no integers": (
        lambda: sign_counts(0.5),
        steepest.Simba,
        "is the original Simba's: its counters are not whole numbers",
    ),
    "counters beyond the window": (
        lambda: sign_counts(7, torch.int16),
        steepest.Simba,
        "beyond its window of 6",
    ),
    "a counter whose magnitude wraps": (
        lambda: sign_counts(-32768, torch.int16),
        steepest.Simba,
        "beyond its window of 6",
    ),
    "an infinite counter": (
        lambda: sign_counts(float("inf")),
        steepest.Simba,
        "beyond its window of 6",
    ),
    "counters for an ablation with a momentum": (
        lambda: sign_counts(1, torch.int16),
        lambda ps: steepest.Simba(ps, memory="momentum"),
        "has no 'exp_avg', which 'simba' needs",
    ),
    "a sum, as torch.optim.SGD's": (
        lambda: saved_by(lambda ps: torch.optim.SGD(ps, momentum=0.9)),
        steepest.Muon,
        r"another optimizer's \(torch.optim.SGD, by its keys\) and does not record its momentum_convention",
    ),
    "an average where a sum is kept": (
        lambda: saved_by(averaging(momentum=0.9)),
        steepest.SGD,
        "whose state 'sgd' cannot use; it can be loaded for .*'muon' or",
    ),
    "a sum or an average": (
        lambda: saved_by(averaging(momentum=0.9, nesterov=True, ns_steps=5)),
        steepest.Muon,
        "an older Muon of Keller Jordan's, by its keys.* does not record its momentum_convention",
    ),
    "no second moment": (
        lambda: saved_by(averaging(momentum=0.9)),
        steepest.NorMuon,
        "whose state 'normuon' cannot use",
    ),
    "torch.optim.Muon's for another rule": (
        lambda: saved_by(torch.optim.Muon),
        steepest.Scion,
        r"\(torch.optim.Muon, by its keys\), whose state 'scion' cannot use",
    ),
    "Nesterov's Signum": (
        lambda: saved_by(signum_of_theirs(nesterov=True)),
        steepest.Signum,
        r"\(Emerging-Optimizers' Signum, by its keys\): it was made with nesterov=True",
    ),
    "Signum scaled by shape": (
        lambda: saved_by(signum_of_theirs(use_shape_scaling=True)),
        steepest.Signum,
        "it was made with use_shape_scaling=True",
    ),
    "Adamax": (
        lambda: saved_by(torch.optim.Adamax),
        steepest.AdamW,
        "has 'exp_inf', which 'adamw' does not know",
    ),
    "an entry is missing": (
        lambda: without_entry(torch.optim.AdamW, "exp_avg_sq"),
        steepest.AdamW,
        "has no 'exp_avg_sq', which 'adamw' needs",
    ),
    "sgd_sai without its scale": (
        lambda: without_entry(SGD_sai, "gsnr"),
        steepest.SGDSaI,
        "has no 'gsnr', 'measured', which 'sgd_sai' needs",
    ),
    "out of range here": (
        lambda: saved_by(lambda ps: torch.optim.Muon(ps, momentum=1.0)),
        steepest.Muon,
        "group 0 of the state dict: momentum must be",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_on_is_refused_and_nothing_is_loaded(name):
    saved, make, words = REFUSED[name]
    _, ours = stepped(make, (4, 4))
    refused(ours, saved(), words)


@pytest.mark.parametrize("make", [steepest.AdamW, torch.optim.AdamW])
def test_state_that_the_rule_does_not_know_is_refused(make):
    _, ours = stepped(steepest.AdamW)
    saved = copy.deepcopy(stepped(make)[1].state_dict())
    saved["state"][0]["exp_avg_slow"] = torch.zeros(3)
    refused(ours, saved, "has 'exp_avg_slow', which 'adamw' does not know; nothing was loaded")


@pytest.mark.parametrize(
    ("make", "option", "value"),
    [
        (lambda ps: steepest.AdamW(ps, amsgrad=True), "amsgrad", False),
        (lambda ps: steepest.SGD(ps, momentum=0.9), "momentum", 0.0),
        (lambda ps: steepest.Simba(ps, memory="momentum"), "memory", "counts"),
        (lambda ps: steepest.QUAD(ps, update_probability=0.5), "update_probability", 1.0),
    ],
)
def test_state_that_an_option_has_left_over_loads(make, option, value):
    """An option may be switched off in mid-training; what it kept is still there when that is saved."""
    _, ours = stepped(make, (4, 4))
    ours.param_groups[0][option] = value
    saved = copy.deepcopy(ours.state_dict())
    ours.load_state_dict(saved)
    assert str(ours.state_dict()) == str(saved)


def test_a_subclass_names_the_state_that_it_keeps_itself():
    class Counting(steepest.Lion):
        extra_state = frozenset({"seen"})

    param, optimizer = stepped(Counting)
    optimizer.state[param]["seen"] = torch.tensor(3.0)
    twin, again = stepped(Counting)
    again.load_state_dict(optimizer.state_dict())
    assert float(again.state[twin]["seen"]) == 3
    _, lion = stepped(steepest.Lion)
    refused(lion, optimizer.state_dict(), "has 'seen', which 'lion' does not know")


@pytest.mark.parametrize("source", [source for source in SOURCES if source.rules], ids=lambda s: s.name)
def test_no_source_hides_another(source):
    """Its own keys find it, whatever stands before it; the rules that it names exist."""
    for rule in source.rules.split():
        ours = {"rule": rule, **find_rule(rule).defaults()}
        theirs = {"params": [], **dict.fromkeys(source.group.split(), 1)}
        states = [dict.fromkeys(source.state.split(), 1)]
        assert [s for s in SOURCES if s.rules and s.matches(theirs, states, ours)] == [source]
        assert next(s for s in SOURCES if s.matches(theirs, states, ours)) is source


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (torch.optim.AdamW, steepest.Lion, "'amsgrad', 'eps'"),
        (lambda p: torch.optim.SGD(p, momentum=0.9), steepest.Signum, "'dampening', 'nesterov'"),
        (torch.optim.Adagrad, steepest.SGD, "another optimizer's"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), steepest.AdamW, "L2"),
    ],
)
def test_another_optimizers_state_dict_is_refused(theirs, ours, words):
    _, saved = stepped(theirs)
    _, optimizer = stepped(ours)
    refused(optimizer, saved.state_dict(), words)


def test_torchs_adam_with_l2_goes_on_with_l2():
    weight, saved = stepped(lambda p: torch.optim.Adam(p, weight_decay=0.1))
    twin = torch.nn.Parameter(weight.detach().clone())
    optimizer = steepest.AdamW([twin], weight_decay_method="l2")
    optimizer.load_state_dict(saved.state_dict())
    for gradient in (0.3, -0.2):
        weight.grad, twin.grad = torch.full((3,), gradient), torch.full((3,), gradient)
        saved.step()
        optimizer.step()
    torch.testing.assert_close(twin, weight, rtol=1e-6, atol=0)


def test_counters_of_another_dtype_are_refused():
    _, optimizer = stepped(lambda p: steepest.Simba(p, counter_dtype=torch.int16))
    for wrong in (torch.float32, torch.int8):
        state_dict = copy.deepcopy(optimizer.state_dict())
        state_dict["state"][0]["counts"] = state_dict["state"][0]["counts"].to(wrong)
        refused(optimizer, state_dict, f"'counts' .* has dtype {wrong}")


def test_state_that_is_no_tensor_is_refused():
    _, optimizer = stepped(steepest.Lion)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0]["exp_avg"] = [1.0, 2.0, 3.0]
    refused(optimizer, state_dict, "'exp_avg' .* is a list")


def test_independent_decay_is_relative_to_the_loaded_groups_own_learning_rate():
    _, saved = stepped(lambda p: torch.optim.SGD(p, lr=10.0, momentum=0.9))
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = steepest.SGD(
        [weight], lr=0.1, momentum=0.9, weight_decay=0.1, weight_decay_method="independent"
    )
    optimizer.load_state_dict(saved.state_dict())
    optimizer.param_groups[0]["weight_decay"] = 0.1
    optimizer.state.clear()
    weight.grad = torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))
