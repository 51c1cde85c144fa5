"""What only a CUDA device can show: no host sync, several devices at once, moving between them."""

from __future__ import annotations

import copy

import pytest
import torch

from .cases import CASES, RULES, Case, able, by_id, deterministic, related
from .training import identical, set_gradients, steps, train, values

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_skipping_never_waits_for_the_device(case: Case):
    params = case.params(device="cuda")
    optimizer = case.make(params, nonfinite="skip", compile=False)
    train(optimizer, params, 4)
    for step in range(4, 8):
        set_gradients(params, step)
        if step % 2:
            params[0].grad.fill_(torch.nan)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert optimizer.skipped_steps == 2


@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_after_skipped_steps_training_is_as_if_they_had_not_been(case: Case):
    params, twins = case.params(device="cuda"), case.params(device="cuda")
    optimizer, twin = case.make(params, nonfinite="skip"), case.make(twins)
    for step in range(6):
        set_gradients(params, 50)
        params[step % 3].grad.view(-1)[0] = torch.inf
        before = values(params)
        optimizer.step()
        assert identical(values(params), before)
        steps(optimizer, params, [step])
        steps(twin, twins, [step])
    assert identical(params, twins)
    assert optimizer.skipped_steps == 6


@pytest.mark.parametrize("case", [c for c in CASES if not related(c) and deterministic(c)], ids=by_id)
def test_parameters_on_several_devices_in_one_group(case: Case):
    near, far = case.params(), case.params(device="cuda")
    alone, far_alone = case.params(), case.params(device="cuda")
    mixed = [near[0], far[1], near[2]]
    train(case.make(mixed, nonfinite="skip"), mixed)
    twins = [alone[0], far_alone[1], alone[2]]
    apart = [case.make([twin]) for twin in twins]
    for step in range(4):
        set_gradients(twins, step)
        for optimizer in apart:
            optimizer.step()
    assert identical(mixed, twins)


@pytest.mark.parametrize("case", CASES, ids=by_id)
def test_a_checkpoint_moves_to_the_device_and_back(case: Case):
    params = case.params()
    optimizer = case.make(params)
    train(optimizer, params, 3)
    far = case.params(device="cuda")
    there = case.make(far)
    there.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param in far:
        for name, value in there.state[param].items():
            single = name in case.tensor_state | {"step"}
            assert value.device.type == ("cpu" if single else "cuda"), name
    train(there, far, 1)
    back = case.make(case.params())
    back.load_state_dict(there.state_dict())
    assert all(value.device.type == "cpu" for state in back.state.values() for value in state.values())


@pytest.mark.parametrize("case", able(RULES, "weight_decay"), ids=by_id)
def test_noise_is_the_cpu_s(case: Case):
    """Stochastic rounding of the same float32 results gives the same bits on every device."""
    near, far = (case.params(torch.bfloat16, device) for device in ("cpu", "cuda"))
    for params in (near, far):
        optimizer = case.make(params, rounding="stochastic", weight_decay=0.1, lr=0.5)
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert identical(near, far)


@pytest.mark.parametrize("case", RULES, ids=by_id)
def test_the_device_s_generator_is_not_touched(case: Case):
    params = case.params(torch.bfloat16, "cuda")
    before = torch.cuda.get_rng_state()
    train(case.make(params, rounding="stochastic", nonfinite="skip"), params)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("case", able(RULES, "compile"), ids=by_id)
def test_compiled_on_the_device_it_follows_eager(case: Case):
    params, twins = case.params(device="cuda"), case.params(device="cuda")
    ours = train(case.make(params, compile=True, nonfinite="skip"), params)
    torch.testing.assert_close(ours, train(case.make(twins, compile=False), twins), rtol=1e-5, atol=1e-6)
