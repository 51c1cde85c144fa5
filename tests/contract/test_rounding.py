"""``rounding="stochastic"``: right in expectation, keyed noise, only where a result is wider than p."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from loops import for_each

from .cases import CASES, RULES, Case, able, by_id, reach, spread
from .training import identical, set_gradients, steps, train

# λ·lr moves 1.0 by a quarter (bfloat16) or a half (float16) of what rounding to nearest could see.
STEP = {torch.bfloat16: 2.0**-11, torch.float16: 2.0**-13}
BELOW_ONE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SIZE = 1 << 14


def _decay_once(case: Case, param: Parameter, *, steps: int = 1, **options: Any) -> Tensor:
    """Steps on zero gradients, so that the decay alone moves the weights: by ``STEP`` relative."""
    amount = STEP[param.dtype]
    options = {"lr": 0.5, "weight_decay": 2 * amount, "weight_decay_method": "decoupled", **options}
    optimizer = case.make([param], **options)
    for _ in range(steps):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    return param.detach().double()


@for_each(("case", "dtype"), spread(able(RULES, "weight_decay"), STEP))
def test_a_decay_too_small_for_nearest_rounding_moves_the_weights(case: Case, dtype: torch.dtype):
    def ones() -> Parameter:
        return case.ones(SIZE, dtype=dtype)

    nearest = _decay_once(case, ones(), rounding="nearest")
    assert torch.equal(nearest, torch.ones_like(nearest))
    rounded = _decay_once(case, ones(), rounding="stochastic")
    grid, share = BELOW_ONE[dtype], STEP[dtype] / BELOW_ONE[dtype]
    assert set(rounded.flatten().tolist()) == {1.0, 1.0 - grid}
    sigma = grid * math.sqrt(share * (1 - share) / SIZE)
    assert abs(rounded.mean().item() - (1 - STEP[dtype])) < 5 * sigma


@pytest.mark.parametrize(
    "case", [each for each in able(RULES, "weight_decay") if not each.rule.transforms], ids=by_id
)
def test_a_decay_of_a_millionth_moves_the_weights_in_expectation(case: Case):
    """Only one in 3,900 weights moves in a step, by 3,900 times as much."""
    size, count = 1 << 16, 10
    param = case.ones(size, dtype=torch.bfloat16)
    after = _decay_once(case, param, rounding="stochastic", steps=count, lr=1.0, weight_decay=1e-6)
    grid = BELOW_ONE[torch.bfloat16]
    # The float32 next to 1 - 1e-6, in which the step is computed.
    step = 1 - float(torch.tensor(1.0) - torch.tensor(1e-6))
    moved = float((1 - after).sum()) / grid
    expected = size * count * step / grid
    assert abs(moved - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize("case", able(RULES, "weight_decay"), ids=by_id)
def test_it_is_unbiased_over_seeds_and_steps(case: Case):
    """One element's rounding depends on the seed and the step too, not on its place alone."""
    count, width = 64, 32
    grid, share = BELOW_ONE[torch.bfloat16], STEP[torch.bfloat16] / BELOW_ONE[torch.bfloat16]
    means = []
    for seed in range(count):
        param = case.ones(width, dtype=torch.bfloat16)
        means.append(_decay_once(case, param, rounding="stochastic", seed=seed))
    per_element = torch.stack(means).mean(0)
    sigma = grid * math.sqrt(share * (1 - share) / count)
    assert (per_element - (1 - STEP[torch.bfloat16])).abs().max().item() < 5 * sigma
    param = case.ones(256, dtype=torch.bfloat16)
    after = _decay_once(case, param, rounding="stochastic", steps=100)
    expected = (1 - STEP[torch.bfloat16]) ** 100
    # Each step adds at most a quarter grid's variance, and the decay only damps it.
    assert abs(after.mean().item() - expected) < 5 * grid * math.sqrt(0.25 * 100 / 256)
    assert after.std() > 0


@for_each(("case", "dtype"), spread(CASES, STEP))
def test_every_result_is_a_neighbour_of_the_float32_result(case: Case, dtype: torch.dtype):
    params = case.params(dtype, shapes=[(64, 4)])
    wide = [Parameter(param.detach().float()) for param in params]
    options = {"weight_decay": 0.1, **case.wide(dtype)}
    optimizer, oracle = case.make(params, rounding="stochastic", **options), case.make(wide, **options)
    set_gradients(params, 0)
    wide[0].grad = params[0].grad.float()
    optimizer.step()
    oracle.step()
    exact, rounded = wide[0].detach(), params[0].detach()
    nearest = exact.to(dtype)
    inexact = nearest.float() != exact
    assert torch.equal(rounded[~inexact], nearest[~inexact]), "what the dtype represents is not touched"
    up = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    down = torch.nextafter(nearest, torch.full_like(nearest, -torch.inf))
    other = torch.where(nearest.float() < exact, up, down)
    assert ((rounded == nearest) | (rounded == other)).all()
    assert (rounded[inexact] == other[inexact]).any()
    assert (rounded[inexact] == nearest[inexact]).any()


@for_each(("case", "dtype"), spread(CASES, STEP))
def test_two_replicas_round_alike_whatever_the_global_seed(case: Case, dtype: torch.dtype):
    def replica(global_seed: int) -> list[Tensor]:
        torch.manual_seed(global_seed)
        params = case.params(dtype, shapes=[(64,), (8, 4)])
        return train(case.make(params, rounding="stochastic"), params)

    assert identical(replica(1), replica(2))


@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_another_seed_rounds_otherwise(case: Case):
    def seeded(seed: int) -> list[Tensor]:
        params = case.params(torch.bfloat16, shapes=[(64,)])
        return train(case.make(params, rounding="stochastic", seed=seed), params)

    assert not identical(seeded(0), seeded(1))
    assert not identical(seeded(0), seeded(1 << 32)), "all 64 bits of the seed count"


@pytest.mark.parametrize("case", able(RULES, "weight_decay"), ids=by_id)
def test_equal_tensors_of_one_optimizer_round_otherwise(case: Case):
    params = [case.ones(256, dtype=torch.bfloat16) for _ in range(2)]
    optimizer = case.make(params, lr=0.5, weight_decay=2.0**-10, rounding="stochastic")
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.param_groups[0]["weight_decay_method"] = "decoupled"
    optimizer.step()
    assert not torch.equal(*(param.detach() for param in params))


@for_each(("case", "dtype"), spread(CASES, [torch.float32, torch.float64]))
def test_wide_parameters_are_not_rounded(case: Case, dtype: torch.dtype):
    params, twins = case.params(dtype), case.params(dtype)
    optimizer, twin = case.make(params, rounding="stochastic"), case.make(twins)
    assert identical(train(optimizer, params), train(twin, twins))
    assert identical(optimizer.state_dict()["state"], twin.state_dict()["state"])


@pytest.mark.parametrize("case", RULES, ids=by_id)
def test_switched_on_between_steps(case: Case):
    params = case.params(torch.bfloat16)
    optimizer = case.make(params)
    steps(optimizer, params, range(2))
    optimizer.param_groups[0]["rounding"] = "stochastic"
    steps(optimizer, params, range(2, 4))
    again = case.make(params)
    again.load_state_dict(optimizer.state_dict())
    assert identical(again.state_dict(), optimizer.state_dict())


@for_each(
    ("rule", "value"),
    spread(
        able(RULES, "infinite weights"),
        [torch.inf, -torch.inf, torch.nan, 3.3895313892515355e38],
        alike=reach,
    ),
)
def test_infinities_and_the_largest_values_stay_what_they_are(rule: Case, value: float):
    param = Parameter(torch.full(rule.shape((16,)), value, dtype=torch.bfloat16))
    _decay_once(rule, param, rounding="stochastic", weight_decay=0.0)
    expected = torch.full_like(param.detach(), value)
    torch.testing.assert_close(param.detach(), expected, rtol=0, atol=0, equal_nan=True)
