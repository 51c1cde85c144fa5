"""bfloat16 and float16 parameters: computed in float32, rounded once."""

import torch
from hypothesis import given

from steepest.random import stochastic_round
from steepest.rule import find_rule
from strategies import LOW, STEPS, bounded, cases, parameters, same


@bounded
@given(cases(dtypes=LOW))
def test_a_step_is_a_float32_step_rounded_once(case):
    if "dtype" in find_rule(case.name).hyper:
        # PSGD's products are in the gradient's dtype unless it is told otherwise; its state then is too.
        case = case.but(options={**case.options, "dtype": torch.float32})
    kept = case.options["state_dtype"] or case.options.get("dtype") or case.dtype
    params = parameters(case.begins())
    optimizer = case.make(params)
    for step in range(STEPS):
        # A float32 twin of everything as it is now.
        twins = parameters(param.detach().float() for param in params)
        twin = case.make(twins, state_dtype=kept, rounding="nearest")
        for param, other in zip(params, twins, strict=True):
            twin.state[other].update({k: v.clone() for k, v in optimizer.state.get(param, {}).items()})
        for param, other, gradient in zip(params, twins, case.gradients(step), strict=True):
            param.grad = gradient
            other.grad = gradient.float()
        optimizer.step()
        twin.step()
        for param, other in zip(params, twins, strict=True):
            exact = other.detach()
            if case.options["rounding"] == "nearest":
                assert same(param.detach(), exact.to(case.dtype))
            else:
                # One of the two neighbours: what no noise and most noise give.
                no, most = torch.zeros(exact.shape).long(), torch.full(exact.shape, 2**32 - 1)
                low, high = (stochastic_round(exact, case.dtype, bits) for bits in (no, most))
                assert ((param.detach() == low) | (param.detach() == high)).all()
            for name, value in twin.state[other].items():
                assert same(optimizer.state[param][name], value), name


@bounded
@given(cases(dtypes=LOW))
def test_a_gradient_of_another_dtype_is_its_own_value(case):
    # bfloat16 and float16 both fit in float32, where everything is computed.
    if "dtype" in find_rule(case.name).hyper:
        case = case.but(options={**case.options, "dtype": torch.float32})
    params, twins = parameters(case.begins()), parameters(case.begins())
    optimizer, twin = case.make(params), case.make(twins)
    for step in range(STEPS):
        for param, other, gradient in zip(params, twins, case.gradients(step), strict=True):
            param.grad = gradient
            other.grad_dtype = None
            other.grad = gradient.float()
        optimizer.step()
        twin.step()
    for param, other in zip(params, twins, strict=True):
        assert same(param.detach(), other.detach())
