"""Every weight-decay method of every rule against its formula, under a schedule."""

import pytest
import torch

from reference import baselines, matrix, sign
from reference.compare import SHAPE, STEPS, assert_follows, halving
from reference.gradients import hard_gradients, start
from reference.noise import leaky_noise
from reference.sgd_sai import SGDSaI
from steepest import OrthogonalizedOptimizer, create

METHODS = ["decoupled", "independent", "untied", "l2", "palm", "sign", "cautious"]
RULES = {
    "adamw": (baselines.AdamW, {}),
    "lion": (sign.Lion, {}),
    "muon": (matrix.Muon, {"method": "svd"}),
    "orthogonalized": (matrix.Orthogonalized, {}),
    "sgd": (baselines.SGD, {"momentum": 0.9}),
    "sgd_sai": (SGDSaI, {}),
    "signgsd": (sign.SignGSD, {}),
    "signum": (sign.Signum, {}),
    "simba": (sign.Simba, {"window_size": 10}),
    "simba_leaky": (sign.SimbaLeaky, {"leak": 0.1}),
}
# The decay is the same code for all matrix rules but Hyperball, which has none.
# η²λ must be visible beside ηλ, and what decays must not be gone after 60 steps.
LR, DECAY = 0.05, 0.3


@pytest.mark.parametrize(
    ("name", "method"),
    # OrthogonalizedOptimizer calls another method "independent": see the mixin's test.
    [(n, m) for n in RULES for m in METHODS if (n, m) != ("orthogonalized", "independent")],
)
def test_method(name, method):
    reference, options = RULES[name]
    noise = {"noise": leaky_noise(SHAPE)} if name == "simba_leaky" else {}
    if name in ("muon", "orthogonalized"):
        noise = {"shape": SHAPE}
    options = {"lr": LR, "weight_decay": DECAY, "weight_decay_method": method, **options}
    if method in ("independent", "untied"):
        options["weight_decay"] = 0.02
    gradients = [g.clamp(-1, 1) for g in hard_gradients(SHAPE, STEPS, seed=1)]
    assert_follows(name, reference, options, gradients=gradients, schedule=halving(LR), **noise)


@pytest.mark.parametrize("method", METHODS)
def test_float32(method):
    options = {"lr": LR, "weight_decay": 0.05, "weight_decay_method": method}
    assert_follows("lion", sign.Lion, options, dtype=torch.float32, schedule=halving(LR))


def decay_alone(method, *, lr, initial_lr, weight_decay=0.25, value=2.0):
    """Where one value goes in one step without a gradient."""
    param = torch.nn.Parameter(torch.tensor([value], dtype=torch.float64))
    optimizer = create(
        "signgsd", [param], lr=initial_lr, weight_decay=weight_decay, weight_decay_method=method
    )
    optimizer.param_groups[0]["lr"] = lr
    param.grad = torch.zeros_like(param)
    optimizer.step()
    return param.item()


def test_the_formulas_in_numbers():
    # p = 2, λ = 1/4, η = 1/8 after η₀ = 1/2: all exact in binary.
    moved = {method: decay_alone(method, lr=0.125, initial_lr=0.5) for method in METHODS}
    assert moved == {
        "decoupled": 2 * (1 - 1 / 32),
        "independent": 2 * (1 - 1 / 16),
        "untied": 2 * (1 - 1 / 4),
        "l2": 2 - 1 / 8,  # sign(0 + λp) = 1
        "palm": 2 * (1 - 1 / 256),
        "sign": 2 - 1 / 32,
        "cautious": 2 * (1 - 1 / 32),  # direction·p = 0 counts as ≥ 0
    }


@pytest.mark.parametrize("method", METHODS)
def test_no_learning_rate_no_decay(method):
    assert decay_alone(method, lr=0.0, initial_lr=0.5) == 2.0


def test_independent_without_a_schedule_does_not_see_the_learning_rate():
    assert decay_alone("independent", lr=1e-3, initial_lr=1e-3) == 1.5
    assert decay_alone("independent", lr=0.7, initial_lr=0.7) == 1.5


class Mixin:
    """Decays as Emerging-Optimizers' WeightDecayMixin documents it, with averaged momentum."""

    def __init__(self, method, momentum, nesterov, param):
        self.method, self.beta, self.nesterov = method, momentum, nesterov
        self.p, self.m = param.clone(), torch.zeros_like(param)

    def step(self, grad, lr, decay):
        grad = grad.clone()
        if self.method == "l2":
            grad += decay * self.p
        else:
            rate = {"decoupled": decay * lr, "independent": decay, "palm": decay * lr * lr}[self.method]
            self.p -= rate * self.p
        self.m = torch.lerp(self.m, grad, 1 - self.beta)
        u = torch.lerp(grad, self.m, self.beta) if self.nesterov else self.m
        self.p -= lr * u


@pytest.mark.parametrize("method", ["decoupled", "independent", "l2", "palm"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_orthogonalized_optimizer_takes_the_mixin_s_names_with_the_mixin_s_meanings(method, nesterov):
    begin = start(SHAPE)
    twins = [torch.nn.Parameter(begin.clone()) for _ in range(3)]
    optimizer = OrthogonalizedOptimizer(
        [{"params": twins[:1]}, {"params": twins[1:2], "weight_decay_method": method, "weight_decay": 0.01}],
        lr=0.1,
        momentum_beta=0.9,
        weight_decay=0.02,
        use_nesterov=nesterov,
        weight_decay_method=method,
        scaled_orthogonalize_fn=torch.nn.Identity(),
    )
    optimizer.add_param_group({"params": twins[2:], "weight_decay_method": method, "weight_decay": 0.03})
    expected = [Mixin(method, 0.9, nesterov, begin) for _ in twins]
    for t, gradient in enumerate(hard_gradients(SHAPE, 30)):
        lr = 0.1 / (t + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for twin, reference, decay in zip(twins, expected, (0.02, 0.01, 0.03), strict=True):
            twin.grad = gradient.clone()
            reference.step(gradient, lr, decay)
        optimizer.step()
        for twin, reference in zip(twins, expected, strict=True):
            torch.testing.assert_close(twin.detach(), reference.p, rtol=1e-12, atol=1e-12)


def test_in_other_classes_and_rules_independent_is_the_common_option():
    matrix, bias, twin = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    options = {"weight_decay": 0.25, "weight_decay_method": "independent"}
    groups = [{"params": [matrix]}, {"params": [bias], "rule": "signgsd", **options}]
    optimizers = [
        OrthogonalizedOptimizer(groups, scaled_orthogonalize_fn=torch.nn.Identity(), **options),
        create("muon", [twin], **options),
    ]
    found = [g["weight_decay_method"] for optimizer in optimizers for g in optimizer.param_groups]
    assert found == ["untied", "independent", "independent"]


@pytest.mark.parametrize("value", [2.0, -2.0])
def test_cautious_decays_only_where_the_step_shrinks(value):
    for gradient in (1.0, -1.0):
        param = torch.nn.Parameter(torch.tensor([value], dtype=torch.float64))
        optimizer = create("lion", [param], lr=0.5, weight_decay=0.25, weight_decay_method="cautious")
        param.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        kept = 0.875 if gradient * value > 0 else 1.0
        assert param.item() == value * kept - 0.5 * gradient


@pytest.mark.parametrize("name", RULES)
def test_l2_never_touches_the_gradient(name):
    param = torch.nn.Parameter(start(SHAPE))
    optimizer = create(name, [param], weight_decay=0.5, weight_decay_method="l2")
    gradient = hard_gradients(SHAPE, 1)[0]
    param.grad = gradient.clone()
    optimizer.step()
    assert torch.equal(param.grad, gradient)
