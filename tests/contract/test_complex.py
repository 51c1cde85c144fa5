"""Complex parameters are stepped as pairs of real numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from loops import for_each

from .cases import CASES, LOW_BIT, Case, able, by_id, related, spread
from .training import gradient, identical, steps, train

every_case = pytest.mark.parametrize("case", able(CASES, "complex"), ids=by_id)

OPTIONS: list[dict[str, Any]] = [
    {"weight_decay": 0.125},
    {"weight_decay": 0.125, "maximize": True, "nonfinite": "skip", "state_dtype": torch.float64},
]


@for_each(
    ("case", "dtype", "options"),
    [
        *spread(able(CASES, "complex"), [torch.complex64, torch.complex128], OPTIONS),
        *((case, dtype, OPTIONS[0]) for case, dtype in LOW_BIT if dtype.is_complex),
    ],
)
def test_a_complex_parameter_is_its_real_view(case: Case, dtype: torch.dtype, options: dict[str, Any]):
    params = case.params(dtype)
    twins = [Parameter(torch.view_as_real(p.detach()).clone()) for p in params]
    optimizer, twin = case.make(params, **options), case.make(twins, **options)
    for step in range(4):
        for index, (param, other) in enumerate(zip(params, twins, strict=True)):
            param.grad = gradient(param, index, step)
            other.grad = torch.view_as_real(param.grad).clone()
        optimizer.step()
        twin.step()
    assert identical([torch.view_as_real(p.detach()) for p in params], twins)
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])


@every_case
def test_a_conjugate_gradient_is_read_as_what_it_means(case: Case):
    params, twins = case.params(torch.complex64), case.params(torch.complex64)
    optimizer, twin = case.make(params), case.make(twins)
    for step in range(2):
        for index, (param, other) in enumerate(zip(params, twins, strict=True)):
            param.grad = gradient(other, index, step).conj()
            other.grad = gradient(other, index, step).conj().resolve_conj()
        optimizer.step()
        twin.step()
    assert identical(params, twins)


@every_case
def test_a_complex_parameter_s_checkpoint_resumes(case: Case):
    params, twins = case.params(torch.complex64), case.params(torch.complex64)
    optimizer = case.make(params)
    steps(optimizer, params, range(2))
    again = case.make(params)
    again.load_state_dict(optimizer.state_dict())
    steps(again, params, range(2, 4))
    assert identical(params, train(case.make(twins), twins, 4))


@every_case
def test_real_and_complex_in_one_group(case: Case):
    params = [*case.params(torch.complex64)[:1], *case.params()[:1]]
    alone = case.params(torch.complex64)[:1]
    train(case.make(params), params)
    train(case.make(alone), alone)
    if not related(case):
        assert identical(params[:1], alone)
