"""Test steps under the caller's settings: float32 precision by either of torch's interfaces, autocast."""

from __future__ import annotations

import contextlib

import pytest
import torch

import steepest
from steepest import OrthogonalizedOptimizer
from steepest.linalg import float32_matmul_precision
from steepest.rules import muon

BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
MATRIX_RULES = [
    name for name in steepest.list_optimizers() if steepest.rule.find_rule(name).scope == "matrix"
]


def precisions():
    return [torch.backends.fp32_precision, *(each.fp32_precision for each in BACKENDS)]


@pytest.fixture(autouse=True)
def _settings():
    """Reset the settings to those of a fresh process before and after every test."""

    def fresh():
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        for each in BACKENDS:
            each.fp32_precision = "none"

    fresh()
    yield
    fresh()


def matrix(*shape, seed=0):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def stepped(optimizer, param):
    param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(7))
    optimizer.step()
    return param


def legacy():
    torch.set_float32_matmul_precision("high")


def for_cuda():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def for_all():
    torch.backends.fp32_precision = "tf32"


def for_both():
    torch.backends.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def mixed():
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.matmul.fp32_precision = "ieee"


@pytest.mark.parametrize("setting", [lambda: None, legacy, for_cuda, for_all, for_both, mixed])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("fails", [False, True])
def test_precision_is_set_inside_and_all_settings_are_restored(setting, precision, fails):
    setting()
    before = precisions()
    with contextlib.suppress(ArithmeticError), float32_matmul_precision(precision):
        assert torch.get_float32_matmul_precision() == precision
        inside = precisions()[1:]
        if fails:
            raise ArithmeticError
    expected = {"highest": ["ieee", "ieee"], "high": ["tf32", "tf32"], "medium": ["tf32", "bf16"]}
    assert inside == expected[precision]
    assert precisions() == before
    # Inherited precisions are still inherited, and a backend's own precision is still its own.
    own = {"for_all": ["none", "none"], "for_both": ["tf32", "bf16"]}.get(setting.__name__, before[1:])
    torch.backends.fp32_precision = "none"
    assert precisions()[1:] == own
    for each in BACKENDS:
        each.fp32_precision = "ieee"
    # The older functions return the precision that they last set.
    told = {"legacy": "high", "mixed": "medium"}.get(setting.__name__, "highest")
    assert torch.get_float32_matmul_precision() == told


@pytest.mark.parametrize("setting", [legacy, for_cuda, for_all, for_both, mixed])
def test_step_works_under_either_interface(setting):
    """The optimizer determines the precision of the polar factor; the caller's settings do not."""
    expected = stepped(steepest.Muon([weight := matrix(6, 4)]), weight)
    setting()
    before = precisions()
    actual = stepped(steepest.Muon([weight := matrix(6, 4)]), weight)
    assert torch.equal(actual, expected)
    assert precisions() == before


class Recording(steepest.Muon):
    """Override orthogonalize, so that the step takes the path for users' functions."""

    def orthogonalize(self, p, grad, **options):
        p.precision = torch.get_float32_matmul_precision()
        return grad


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_muons_products_have_the_requested_precision(precision, monkeypatch):
    seen = []

    def spy(x, *args, **kwargs):
        seen.append(torch.get_float32_matmul_precision())
        return x

    monkeypatch.setattr(muon, "newton_schulz", spy)
    stepped(steepest.Muon([weight := matrix(4, 4)], fp32_matmul_prec=precision), weight)
    assert seen[-1] == precision
    stepped(Recording([weight := matrix(4, 4)], fp32_matmul_prec=precision), weight)
    assert weight.precision == precision


@pytest.mark.filterwarnings("ignore:.*the momentum is used as it is")
@pytest.mark.parametrize("name", MATRIX_RULES)
def test_autocast_around_a_step_changes_nothing(name):
    plain, within = matrix(6, 4), matrix(6, 4)
    for weight, context in (
        (plain, contextlib.nullcontext()),
        (within, torch.autocast("cpu", torch.bfloat16)),
    ):
        optimizer = steepest.create(name, [weight], lr=0.1)
        for _ in range(3):
            with context:
                stepped(optimizer, weight)
    assert torch.equal(plain, within)


def test_autocast_around_a_step_does_not_affect_users_functions():
    class Product(OrthogonalizedOptimizer):
        def orthogonalize(self, p, grad, **options):
            return grad @ grad.mT @ grad

    plain, within = matrix(6, 4), matrix(6, 4)
    stepped(Product([plain], lr=0.1), plain)
    optimizer = Product([within], lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        stepped(optimizer, within)
    assert torch.equal(plain, within)


@pytest.mark.parametrize("nesterov", [False, True])
def test_in_place_changes_by_users_functions_do_not_persist(nesterov):
    class Clearing(OrthogonalizedOptimizer):
        def orthogonalize(self, p, grad, **options):
            return grad.mul_(0)

    weight = matrix(3, 3)
    optimizer = Clearing([weight], lr=0.1, momentum_beta=0.5, use_nesterov=nesterov)
    stepped(optimizer, weight)
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], 0.5 * weight.grad)
    assert weight.grad.any()
