"""Symmetries of the equations: scaling the gradient, turning it round, reflecting, permuting."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies import (
    ANY_ORDER,
    METHODS,
    RULES,
    STEPS,
    assert_same,
    bounded,
    cases,
    draws,
    lines,
    parameters,
    run,
    same,
)

SIGN_RULES = ("lion", "signum", "signgsd", "simba", "simba_leaky")
NO_L2 = tuple(method for method in METHODS if method != "l2")
WIDE = (torch.float32, torch.float64)
powers_of_two = st.integers(-20, 20).map(lambda n: 2.0**n)


@bounded
@given(cases(names=SIGN_RULES, methods=NO_L2, dtypes=WIDE), powers_of_two)
def test_sign_rules_do_not_see_the_gradients_scale(case, scale):
    params, twins = parameters(case.begins()), parameters(case.begins())
    optimizer, twin = case.make(params), case.make(twins)
    run(case, params, optimizer)
    run(case, twins, twin, lambda g: scale * g)
    for param, other in zip(params, twins, strict=True):
        assert same(param.detach(), other.detach())
        if "counts" in optimizer.state[param]:
            assert same(optimizer.state[param]["counts"], twin.state[other]["counts"])


@bounded
@given(cases(names=("sgd_sai", "sgd"), methods=NO_L2, dtypes=WIDE), powers_of_two)
def test_linear_rules_scale_with_the_gradient(case, scale):
    options = {**case.options, "weight_decay": 0.0} | ({"eps": 0.0} if case.name == "sgd_sai" else {})
    case = case.but(options=options)
    params, twins = parameters(0 * v for v in case.begins()), parameters(0 * v for v in case.begins())
    optimizer, twin = case.make(params), case.make(twins)
    run(case, params, optimizer)
    run(case, twins, twin, lambda g: scale * g)
    for param, other in zip(params, twins, strict=True):
        assert same(param.detach() * scale, other.detach())
        if case.name == "sgd_sai":
            assert same(optimizer.state[param]["gsnr"], twin.state[other]["gsnr"])


@bounded
@given(cases())
def test_to_maximize_is_to_minimize_the_negative(case):
    params, twins = parameters(case.begins()), parameters(case.begins())
    optimizer, twin = case.make(params, maximize=True), case.make(twins, maximize=False)
    run(case, params, optimizer)
    run(case, twins, twin, torch.neg)
    assert_same(params, twins, optimizer, twin)


@bounded
@given(cases(names=tuple(name for name in RULES if not draws(name))))
def test_reflection(case):
    # Rounding to nearest and stochastic rounding treat both signs alike, bit for bit.
    params, twins = parameters(case.begins()), parameters(-v for v in case.begins())
    optimizer, twin = case.make(params), case.make(twins)
    run(case, params, optimizer)
    run(case, twins, twin, torch.neg)
    for param, other in zip(params, twins, strict=True):
        assert same(param.detach(), -other.detach())


@bounded
@given(cases(names=ANY_ORDER, rounding=False, tensors=1, shape=lines), st.integers(0, 99))
def test_permuted_elements_give_the_permuted_result(case, seed):
    if case.noisy:
        return
    (count,) = case.shapes[0]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    params, twins = parameters(case.begins()), parameters(v[order] for v in case.begins())
    optimizer, twin = case.make(params), case.make(twins)
    run(case, params, optimizer)
    run(case, twins, twin, lambda g: g[order])
    ours, other = params[0].detach()[order], twins[0].detach()
    if case.name == "sgd_sai":
        # Sums in another order, in float64, rounded to a float32 G: at most a float32 ulp apart.
        torch.testing.assert_close(ours, other, rtol=2e-2 if case.dtype.itemsize == 2 else 1e-6, atol=1e-6)
    else:
        assert same(ours, other)


@bounded
@given(cases())
def test_nothing_moves_on_zero_gradients_without_decay(case):
    case = case.but(options={**case.options, "weight_decay": 0.0})
    params = parameters(case.begins())
    optimizer = case.make(params)
    run(case, params, optimizer, torch.zeros_like)
    for param, begin in zip(params, case.begins(), strict=True):
        assert same(param.detach(), begin)


@bounded
@given(cases())
def test_the_gradient_is_left_as_it_was(case):
    params = parameters(case.begins())
    optimizer = case.make(params)
    for step in range(STEPS):
        for param, gradient in zip(params, case.gradients(step), strict=True):
            param.grad = gradient
        held = [param.grad for param in params]
        optimizer.step()
        for param, gradient, expected in zip(params, held, case.gradients(step), strict=True):
            assert param.grad is gradient
            assert same(gradient, expected)
