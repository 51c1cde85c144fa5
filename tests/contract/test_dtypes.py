"""Dtypes: mixed in a group, of the gradient, of the state; low precision is computed in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from loops import for_each

from .cases import CASES, RULES, Case, by_id, deterministic, reach, related, spread
from .training import gradient, identical, set_gradients, steps, train, values

LOW = [torch.bfloat16, torch.float16]
ALL = [torch.float32, torch.float64, *LOW]
ALONE = [case for case in CASES if deterministic(case) and not related(case)]


@for_each("case", ALONE)
def test_mixed_dtypes_in_a_group_step_as_if_alone(case: Case):
    dtypes = [*ALL, *([] if "complex" in case.cannot else [torch.complex64]), torch.float32]

    def mixed() -> list[Parameter]:
        return [case.params(dtype)[0] for dtype in dtypes]

    params, twins = mixed(), mixed()
    optimizer, apart = case.make(params), [case.make([twin]) for twin in twins]
    for step in range(3):
        set_gradients(params, step)
        set_gradients(twins, step)
        optimizer.step()
        for other in apart:
            other.step()
    assert [p.dtype for p in params] == dtypes
    assert identical(params, twins)


@for_each(("case", "options", "dtype"), spread(CASES, [{}, {"weight_decay": 0.25}], LOW))
def test_low_precision_is_computed_in_float32_and_rounded_once(
    case: Case, dtype: torch.dtype, options: dict[str, Any]
):
    params = case.params(dtype)
    wide = [Parameter(param.detach().float()) for param in params]
    options = {**options, **case.wide(torch.float32)}
    optimizer, oracle = case.make(params, **options), case.make(wide, **options)
    for index, (param, other) in enumerate(zip(params, wide, strict=True)):
        param.grad = gradient(param, index, 0)
        other.grad = param.grad.float()
    optimizer.step()
    oracle.step()
    assert identical(values(params), [other.detach().to(dtype) for other in wide])
    for param, other in zip(params, wide, strict=True):
        for name, value in oracle.state[other].items():
            assert identical(optimizer.state[param][name], value.to(optimizer.state[param][name].dtype)), name


@for_each(("case", "dtype", "grad_dtype"), spread(CASES, ALL, ALL, alike=reach))
def test_a_gradient_of_another_dtype_counts_with_its_value(
    case: Case, dtype: torch.dtype, grad_dtype: torch.dtype
):
    """Gradients that both dtypes represent: the dtype that carries them must not matter."""
    params, twins = case.params(dtype), case.params(dtype)
    for param in params:
        param.grad_dtype = grad_dtype
    optimizer, twin = (case.make(some, **case.wide(dtype)) for some in (params, twins))
    for step in range(3):
        for index, (param, other) in enumerate(zip(params, twins, strict=True)):
            coarse = (gradient(other, index, step) * 16).round() / 16
            param.grad, other.grad = coarse.to(grad_dtype), coarse
        before = values([param.grad for param in params])
        optimizer.step()
        twin.step()
        assert identical([param.grad for param in params], before)
    assert identical(params, twins)
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])


@pytest.mark.parametrize("case", RULES, ids=by_id)
def test_a_float32_gradient_of_a_bfloat16_parameter_is_not_rounded_first(case: Case):
    (param,) = case.params(torch.bfloat16, shapes=[(64,)])
    wide = Parameter(param.detach().float())
    param.grad_dtype = torch.float32
    options = case.wide(torch.float32)
    optimizer, oracle = case.make([param], state_dtype=torch.float32, **options), case.make([wide], **options)
    param.grad = gradient(wide, 0, 0)
    wide.grad = param.grad.clone()
    optimizer.step()
    oracle.step()
    assert identical(param.detach(), wide.detach().to(torch.bfloat16))
    assert identical(optimizer.state_dict()["state"], oracle.state_dict()["state"])


@for_each("case", CASES)
def test_backward_through_grad_dtype(case: Case):
    params = case.params(torch.bfloat16)
    for param in params:
        param.grad_dtype = torch.float32
    optimizer = case.make(params)
    sum(param.float().pow(2).sum() for param in params).backward()
    assert {param.grad.dtype for param in params} == {torch.float32}
    optimizer.step()
    assert {param.dtype for param in params} == {torch.bfloat16}


STATE = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@for_each(("case", "dtype", "state_dtype"), spread(CASES, ALL, [None, *STATE]))
def test_state_dtype_is_the_dtype_of_momentum_and_kin(case: Case, dtype: torch.dtype, state_dtype: Any):
    params = case.params(dtype)
    optimizer = case.make(params, state_dtype=state_dtype)
    steps(optimizer, params, range(3))
    for param in params:
        for name, value in optimizer.state[param].items():
            if name == "step":
                assert value.dtype == torch.float64  # counts beyond 2²⁴
            elif name in case.tensor_state:
                assert value.dtype in (torch.float32, torch.promote_types(torch.float32, dtype.to_real())), (
                    name
                )
            elif name in case.factors(optimizer, param):
                assert value.dtype in (dtype, torch.promote_types(torch.float32, dtype)), name
            elif value.is_floating_point():
                assert value.dtype == (state_dtype or dtype), name
            else:
                assert value.dtype in (torch.int16, torch.int8), name
            assert value.isfinite().all(), name


@for_each(("case", "state_dtype"), spread(CASES, [torch.float8_e4m3fn, torch.float8_e5m2]))
def test_state_dtype_may_be_any_float_dtype(case: Case, state_dtype: torch.dtype):
    params = case.params()
    optimizer = case.make(params, state_dtype=state_dtype)
    steps(optimizer, params, range(2))
    kept = [
        value.dtype
        for param, state in optimizer.state.items()
        for name, value in state.items()
        if value.is_floating_point() and value.dim() and name not in case.factors(optimizer, param)
    ]
    assert set(kept) <= {state_dtype}


@for_each(("case", "state_dtype"), spread(CASES, STATE))
def test_state_is_computed_wide_and_rounded_once(case: Case, state_dtype: torch.dtype):
    """Two steps from zero state: the first is exact up to the last rounding."""
    params, twins = case.params(), case.params()
    optimizer, oracle = (
        case.make(params, state_dtype=state_dtype),
        case.make(twins, state_dtype=torch.float32),
    )
    steps(optimizer, params, [0])
    steps(oracle, twins, [0])
    for param, twin in zip(params, twins, strict=True):
        for name, value in oracle.state[twin].items():
            ours = optimizer.state[param][name]
            if state_dtype == torch.float64:
                # A factor's numbers follow from products and bases, computed wide or not.
                loose = 100 if name in case.factors(oracle, twin) else 1
                torch.testing.assert_close(ours, value.to(ours.dtype), rtol=loose * 1e-6, atol=loose * 1e-7)
            else:
                assert identical(ours, value.to(ours.dtype)), name


@for_each("case", CASES)
def test_counters_do_not_care_about_state_dtype(case: Case):
    params, twins = case.params(), case.params()
    optimizer, twin = case.make(params, state_dtype=torch.bfloat16), case.make(twins)
    steps(optimizer, params, range(2))
    steps(twin, twins, range(2))
    for param, other in zip(params, twins, strict=True):
        ours, theirs = optimizer.state[param], twin.state[other]
        integers = [name for name, value in theirs.items() if not value.is_floating_point()]
        if case.rule.name.startswith("simba") and "memory" not in case.options:
            assert integers or case.options.get("choice") == "memory"
        for name in integers:
            assert ours[name].dtype == theirs[name].dtype, name


@pytest.mark.parametrize("case", RULES, ids=by_id)
def test_wider_state_of_a_low_precision_parameter_remembers_small_gradients(case: Case):
    """bfloat16 momentum forgets a gradient of 2⁻¹⁰ of itself; float32 momentum adds it up."""
    params = case.params(torch.bfloat16, shapes=[(64,)])
    twins = [Parameter(param.detach().float()) for param in params]
    options = case.wide(torch.float32)
    optimizer, twin = case.make(params, state_dtype=torch.float32, **options), case.make(twins, **options)
    for step in range(6):
        grad = torch.full_like(twins[0], 1.0 if step == 0 else 2.0**-10)
        params[0].grad, twins[0].grad = grad.bfloat16(), grad
        optimizer.step()
        twin.step()
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])


@for_each("rule", RULES)
def test_training_in_every_dtype_follows_float64(rule: Case):
    """One step of each dtype lands within that dtype's rounding of the float64 step."""
    for dtype in (torch.float32, *LOW):
        params = rule.params(dtype)
        wide = [Parameter(p.detach().double()) for p in params]
        # Newton-Schulz would amplify rounding in directions where the gradient is small.
        options = {"weight_decay": 0.25, **({"method": "svd"} if "method" in rule.rule.hyper else {})}
        optimizer, oracle = rule.make(params, **options), rule.make(wide, **options)
        for index, (param, other) in enumerate(zip(params, wide, strict=True)):
            param.grad = gradient(param, index, 0)
            other.grad = param.grad.double()
        before = [p.detach().clone() for p in wide]
        optimizer.step()
        oracle.step()
        for param, other, old in zip(params, wide, before, strict=True):
            eps = torch.finfo(dtype).eps
            # A direction's error of one rounding grows with the step.
            moved = max(1.0, float((other.detach() - old).abs().max()))
            close = 4 * eps * moved
            torch.testing.assert_close(param.detach().double(), other.detach(), rtol=4 * eps, atol=close)


@for_each("rule", RULES)
def test_a_parameter_may_be_cast_between_steps(rule: Case):
    """As ``model.bfloat16()`` does: the parameter's data is replaced, its state stays."""
    params = rule.params()
    optimizer = rule.make(params)
    train(optimizer, params, 2)
    for param in params:
        param.grad = None
        param.data = param.data.to(torch.bfloat16)
    steps(optimizer, params, range(2, 4))
    assert {param.dtype for param in params} == {torch.bfloat16}
    assert all(param.isfinite().all() for param in params)
