"""Dtypes: mixed in a group, of the gradient, of the state; low precision is computed in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from .cases import CASES, RULES, Case, by_id, deterministic
from .training import gradient, identical, make_params, set_gradients, steps, train, values

LOW = [torch.bfloat16, torch.float16]
ALL = [torch.float32, torch.float64, *LOW]
ALONE = [case for case in CASES if deterministic(case) and case.options.get("normalize") != "max"]


@pytest.mark.parametrize("case", ALONE, ids=by_id)
def test_mixed_dtypes_in_a_group_step_as_if_alone(case: Case):
    dtypes = [*ALL, torch.complex64, torch.float32]

    def mixed() -> list[Parameter]:
        return [make_params(dtype)[0] for dtype in dtypes]

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


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.25}], ids=str)
@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_low_precision_is_computed_in_float32_and_rounded_once(
    case: Case, dtype: torch.dtype, options: dict[str, Any]
):
    params = make_params(dtype)
    wide = [Parameter(param.detach().float()) for param in params]
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


@pytest.mark.parametrize("grad_dtype", ALL, ids=str)
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_a_gradient_of_another_dtype_counts_with_its_value(
    case: Case, dtype: torch.dtype, grad_dtype: torch.dtype
):
    """Gradients that both dtypes represent: the dtype that carries them must not matter."""
    params, twins = make_params(dtype), make_params(dtype)
    for param in params:
        param.grad_dtype = grad_dtype
    optimizer, twin = case.make(params), case.make(twins)
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
    (param,) = make_params(torch.bfloat16, shapes=[(64,)])
    wide = Parameter(param.detach().float())
    param.grad_dtype = torch.float32
    optimizer, oracle = case.make([param], state_dtype=torch.float32), case.make([wide])
    param.grad = gradient(wide, 0, 0)
    wide.grad = param.grad.clone()
    optimizer.step()
    oracle.step()
    assert identical(param.detach(), wide.detach().to(torch.bfloat16))
    assert identical(optimizer.state_dict()["state"], oracle.state_dict()["state"])


def test_backward_through_grad_dtype(case: Case):
    params = make_params(torch.bfloat16)
    for param in params:
        param.grad_dtype = torch.float32
    optimizer = case.make(params)
    sum(param.float().pow(2).sum() for param in params).backward()
    assert {param.grad.dtype for param in params} == {torch.float32}
    optimizer.step()
    assert {param.dtype for param in params} == {torch.bfloat16}


STATE = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("state_dtype", [None, *STATE], ids=str)
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_state_dtype_is_the_dtype_of_momentum_and_kin(case: Case, dtype: torch.dtype, state_dtype: Any):
    params = make_params(dtype)
    optimizer = case.make(params, state_dtype=state_dtype)
    steps(optimizer, params, range(3))
    for param in params:
        for name, value in optimizer.state[param].items():
            if name in case.rule.tensor_state | {"step"}:
                assert value.dtype == torch.float32, name
            elif value.is_floating_point():
                assert value.dtype == (state_dtype or dtype), name
            else:
                assert value.dtype in (torch.int16, torch.int8), name
            assert value.isfinite().all(), name


@pytest.mark.parametrize("state_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_state_dtype_may_be_any_float_dtype(case: Case, state_dtype: torch.dtype):
    params = make_params()
    optimizer = case.make(params, state_dtype=state_dtype)
    steps(optimizer, params, range(2))
    kept = [
        v.dtype for s in optimizer.state.values() for v in s.values() if v.is_floating_point() and v.dim()
    ]
    assert set(kept) <= {state_dtype}


@pytest.mark.parametrize("state_dtype", STATE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_state_is_computed_wide_and_rounded_once(case: Case, state_dtype: torch.dtype):
    """Two steps from zero state: the first is exact up to the last rounding."""
    params, twins = make_params(), make_params()
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
                torch.testing.assert_close(ours, value.to(ours.dtype), rtol=1e-6, atol=1e-7)
            else:
                assert identical(ours, value.to(ours.dtype)), name


def test_counters_do_not_care_about_state_dtype(case: Case):
    params, twins = make_params(), make_params()
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
    params, twins = make_params(torch.bfloat16, shapes=[(64,)]), make_params(shapes=[(64,)])
    optimizer, twin = case.make(params, state_dtype=torch.float32), case.make(twins)
    for step in range(6):
        grad = torch.full((64,), 1.0 if step == 0 else 2.0**-10)
        params[0].grad, twins[0].grad = grad.bfloat16(), grad
        optimizer.step()
        twin.step()
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])


def test_training_in_every_dtype_follows_float64(rule: Case):
    """One step of each dtype lands within that dtype's rounding of the float64 step."""
    for dtype in (torch.float32, *LOW):
        params = make_params(dtype)
        wide = [Parameter(p.detach().double()) for p in params]
        optimizer, oracle = rule.make(params, weight_decay=0.25), rule.make(wide, weight_decay=0.25)
        for index, (param, other) in enumerate(zip(params, wide, strict=True)):
            param.grad = gradient(param, index, 0)
            other.grad = param.grad.double()
        optimizer.step()
        oracle.step()
        for param, other in zip(params, wide, strict=True):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(param.detach().double(), other.detach(), rtol=4 * eps, atol=4 * eps)


def test_a_parameter_may_be_cast_between_steps(rule: Case):
    """As ``model.bfloat16()`` does: the parameter's data is replaced, its state stays."""
    params = make_params()
    optimizer = rule.make(params)
    train(optimizer, params, 2)
    for param in params:
        param.grad = None
        param.data = param.data.to(torch.bfloat16)
    steps(optimizer, params, range(2, 4))
    assert {param.dtype for param in params} == {torch.bfloat16}
    assert all(param.isfinite().all() for param in params)
