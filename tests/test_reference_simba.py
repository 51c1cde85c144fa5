"""Simba and its ablations follow the equations, step by step."""

import itertools

import pytest
import torch

from loops import for_each
from reference import sign
from reference.compare import SHAPE, STEPS, assert_follows
from reference.gradients import hard_gradients, start
from steepest import Lion, Simba

DTYPES = [torch.float64, torch.float32]


@for_each("dtype", DTYPES)
@for_each("counter_dtype", [torch.int16, torch.int8])
@for_each(
    "options",
    [
        {},
        {"window_size": 10, "threshold": 0.25},
        {"window_size": 5, "threshold": 0.1},  # ⌊0.5⌋ = 0: every counter that is not 0 decides
        {"window_size": 1, "threshold": 0.0},
        {"window_size": 3, "threshold": 1.0},  # |s| > 3 never: the gradient's own sign
        {"window_size": 20, "threshold": 0.3, "weight_decay": 0.4},
        {"window_size": 20, "threshold": 0.3, "weight_decay": 0.4, "maximize": True},
    ],
)
def test_simba(options, counter_dtype, dtype):
    window = {"window_size": 126} if counter_dtype == torch.int8 else {}
    assert_follows(
        "simba", sign.Simba, {"lr": 3e-3, "counter_dtype": counter_dtype, **window, **options}, dtype=dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.6, 0.9)])
@pytest.mark.parametrize(
    ("memory", "choice"), list(itertools.product(["counts", "momentum"], ["threshold", "lion", "memory"]))
)
def test_ablations(memory, choice, betas, dtype):
    options = {"lr": 3e-3, "window_size": 8, "threshold": 0.3, "weight_decay": 0.1, "betas": betas}
    assert_follows("simba", sign.Simba, {**options, "memory": memory, "choice": choice}, dtype=dtype)


def paired(first, second, gradients):
    """Two optimizers on equal parameters and gradients: (parameters of the one, of the other) each step."""
    a, b = (torch.nn.Parameter(start(SHAPE)) for _ in range(2))
    one, other = first(a), second(b)
    for gradient in gradients:
        a.grad, b.grad = gradient.clone(), gradient.clone()
        one.step()
        other.step()
        yield a.detach(), b.detach()


def test_momentum_with_lions_choice_is_lion():
    common = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
    pairs = paired(
        lambda p: Simba([p], memory="momentum", choice="lion", **common),
        lambda p: Lion([p], **common),
        hard_gradients(SHAPE, STEPS),
    )
    for ours, lions in pairs:
        assert torch.equal(ours, lions)


def test_momentum_with_lions_choice_is_lion_where_the_two_cancel():
    # β = ½: m = g/2 after one step, and −g/2 next makes c exactly 0, where Lion does not move.
    common = {"lr": 3e-3, "betas": (0.5, 0.5)}
    g = torch.ones(SHAPE, dtype=torch.float64)
    pairs = paired(
        lambda p: Simba([p], memory="momentum", choice="lion", **common),
        lambda p: Lion([p], **common),
        [g, -g / 2, g],
    )
    for ours, lions in pairs:
        assert torch.equal(ours, lions)


def test_threshold_of_one_is_sign_descent():
    # |s| never exceeds w, so the gradient's own sign always decides.
    param = torch.nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64))
    optimizer = Simba([param], lr=1.0, window_size=4, threshold=1.0)
    expected = torch.zeros(SHAPE, dtype=torch.float64)
    for gradient in hard_gradients(SHAPE, STEPS):
        param.grad = gradient
        optimizer.step()
        expected -= gradient.sign()
        assert torch.equal(param, expected)


@pytest.mark.parametrize(
    ("memory", "choice", "kept"),
    [
        ("counts", "threshold", {"counts"}),
        ("momentum", "threshold", {"counts", "exp_avg"}),
        ("counts", "lion", {"counts", "exp_avg"}),
        ("momentum", "memory", {"exp_avg"}),
    ],
)
def test_state_is_what_the_row_of_the_table_needs(memory, choice, kept):
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = Simba([param], memory=memory, choice=choice)
    param.grad = torch.ones(3)
    optimizer.step()
    assert set(optimizer.state[param]) == kept


@pytest.mark.parametrize(("dtype", "size"), [(torch.int16, 2), (torch.int8, 1)])
def test_bytes_of_the_counters(dtype, size):
    param = torch.nn.Parameter(torch.zeros(1000))
    optimizer = Simba([param], window_size=100, counter_dtype=dtype)
    param.grad = torch.ones(1000)
    optimizer.step()
    assert optimizer.state[param]["counts"].dtype == dtype
    assert optimizer.state_bytes() == 1000 * size


def test_defaults():
    defaults = Simba([torch.nn.Parameter(torch.zeros(1))]).defaults
    expected = {"lr": 1e-4, "window_size": 128, "threshold": 0.1, "weight_decay": 0}
    assert defaults.items() >= {**expected, "weight_decay_method": "decoupled"}.items()
