"""Where and how a tensor lies in memory does not matter: strides, offsets, complex numbers as pairs."""

import torch
from hypothesis import given

from strategies import REAL_ONLY, RULES, STEPS, assert_same, bounded, cases, laid_out, parameters, run, same

COMPLEX = tuple(name for name in RULES if name not in REAL_ONLY)


@bounded
@given(cases())
def test_strides_do_not_matter(case):
    half = len(case.shapes)
    params = parameters(laid_out(v, how) for v, how in zip(case.begins(), case.layouts[:half], strict=True))
    twins = parameters(case.begins())
    optimizer, twin = case.make(params), case.make(twins)
    for step in range(STEPS):
        for param, other, gradient, how in zip(
            params, twins, case.gradients(step), case.layouts[half:], strict=True
        ):
            param.grad = laid_out(gradient, how)
            other.grad = gradient
        strides = [param.stride() for param in params]
        optimizer.step()
        twin.step()
        assert [param.stride() for param in params] == strides
        assert_same(params, twins, optimizer, twin)


@bounded
@given(cases(tensors=2))
def test_what_lies_between_the_elements_is_left_alone(case):
    rooms = [torch.full((2 * v.numel() + 1,), 7.0, dtype=case.dtype) for v in case.begins()]
    params = parameters(
        room[1::2].view(v.shape) if v.dim() == 1 else room[1 : 1 + v.numel()].view(v.shape)
        for room, v in zip(rooms, case.begins(), strict=True)
    )
    optimizer = case.make(params)
    run(case, params, optimizer)
    for room, param in zip(rooms, params, strict=True):
        touched = torch.zeros(len(room), dtype=torch.bool)
        if param.dim() == 1:
            touched[1::2] = True
        else:
            touched[1 : 1 + param.numel()] = True
        assert (room[~touched] == 7).all()


@bounded
@given(cases(names=COMPLEX, dtypes=(torch.complex64, torch.complex128)))
def test_complex_numbers_are_pairs_of_reals(case):
    params = parameters(laid_out(v, how) for v, how in zip(case.begins(), case.layouts, strict=False))
    pairs = parameters(torch.view_as_real(v).clone() for v in case.begins())
    optimizer, twin = case.make(params), case.make(pairs)
    for step in range(STEPS):
        for param, pair, gradient in zip(params, pairs, case.gradients(step), strict=True):
            param.grad = gradient
            pair.grad = torch.view_as_real(gradient).clone()
        optimizer.step()
        twin.step()
    for param, pair in zip(params, pairs, strict=True):
        assert same(torch.view_as_real(param.detach()), pair.detach())
