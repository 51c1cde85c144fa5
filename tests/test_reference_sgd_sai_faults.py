"""The original SGD-SaI's faults, each not here."""

import math

import pytest
import torch

from reference.gradients import hard_gradients, start
from steepest import SGDSaI

SHAPE = (4, 5)


def fresh(**options):
    param = torch.nn.Parameter(start(SHAPE))
    return param, SGDSaI([param], lr=1e-2, **options)


def run(param, optimizer, gradients):
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize("stop", [1, 2, 7])
def test_resume_does_not_measure_again(stop, batches):
    gradients = hard_gradients(SHAPE, 20)
    gradients = gradients[:stop] + [1000 * (g + 1) for g in gradients[stop:]]
    straight, whole = fresh(warmup_batches=batches)
    run(straight, whole, gradients)

    before, first = fresh(warmup_batches=batches)
    run(before, first, gradients[:stop])
    after, second = fresh(warmup_batches=batches)
    after.data.copy_(before.data)
    second.load_state_dict(first.state_dict())
    run(after, second, gradients[stop:])
    assert torch.equal(after, straight)
    for name, value in whole.state[straight].items():
        assert torch.equal(value, second.state[after][name]), name


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("zeros", [1, 3])
def test_zero_gradients_first_change_nothing_that_follows(zeros, momentum):
    # LoRA's A matrix; and the step that makes the state exist before a checkpoint is loaded.
    gradients = hard_gradients(SHAPE, 20)
    gradients[0] = gradients[0] + 0.1
    one, without = fresh(momentum=momentum, weight_decay=0.0)
    other, with_zeros = fresh(momentum=momentum, weight_decay=0.0)
    run(other, with_zeros, [torch.zeros(SHAPE, dtype=torch.float64)] * zeros)
    assert torch.equal(other, one)
    assert float(with_zeros.state[other]["measured"]) == 0
    run(one, without, gradients)
    run(other, with_zeros, gradients)
    assert torch.equal(other, one)


def test_a_zero_step_at_lr_zero_changes_nothing_that_follows():
    gradients = [g + 0.1 for g in hard_gradients(SHAPE, 20)]
    one, without = fresh(weight_decay=0.3)
    other, with_zero = fresh(weight_decay=0.3)
    with_zero.param_groups[0]["lr"] = 0.0
    run(other, with_zero, [torch.zeros(SHAPE, dtype=torch.float64)])
    with_zero.param_groups[0]["lr"] = 1e-2
    run(one, without, gradients)
    run(other, with_zero, gradients)
    assert torch.equal(other, one)


def test_a_non_finite_first_gradient_defers_the_measurement():
    param, optimizer = fresh(weight_decay=0.0)
    bad, good = hard_gradients(SHAPE, 2)
    bad[0, 0] = math.inf
    before = param.detach().clone()
    run(param, optimizer, [bad])
    moved = (param.detach() - before)[1:]
    torch.testing.assert_close(moved, -1e-2 * bad[1:], rtol=1e-9, atol=1e-15)  # G = 1
    run(param, optimizer, [good])
    expected = float(good.norm() / (good.std() + 1e-8))
    assert optimizer.state[param]["gsnr"].item() == pytest.approx(expected, rel=1e-14)


def test_a_gradient_that_comes_later_is_measured_then():
    early, late = (torch.nn.Parameter(start(SHAPE, seed)) for seed in (0, 1))
    optimizer = SGDSaI([early, late], lr=1e-2)
    begin = late.detach().clone()
    gradients = [g + 0.1 for g in hard_gradients(SHAPE, 12)]
    for gradient in gradients[:5]:
        early.grad = gradient.clone()
        optimizer.step()
    assert late not in optimizer.state
    assert torch.equal(late, begin)
    for gradient in gradients[5:]:
        early.grad, late.grad = gradient.clone(), gradient.clone()
        optimizer.step()
    alone = torch.nn.Parameter(begin.clone())
    run(alone, SGDSaI([alone], lr=1e-2), gradients[5:])
    assert torch.equal(late, alone)


def test_without_momentum():
    # The original raises UnboundLocalError.
    param, optimizer = fresh(momentum=0.0, weight_decay=0.0)
    expected = param.detach().clone()
    gradients = hard_gradients(SHAPE, 20)
    scale = float(gradients[0].norm() / (gradients[0].std() + 1e-8))
    for gradient in gradients:
        run(param, optimizer, [gradient])
        expected -= 1e-2 * scale * gradient
        torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=1e-12)
    assert "momentum_buffer" not in optimizer.state[param]


def test_the_closure_is_called_once_in_the_first_step_too():
    param, optimizer = fresh()
    calls = []

    def closure():
        calls.append(1)
        param.grad = torch.ones_like(param)
        return 5.0

    assert optimizer.step(closure) == 5.0
    assert len(calls) == 1


def test_nothing_is_printed(capsys):
    param, optimizer = fresh()
    run(param, optimizer, hard_gradients(SHAPE, 3))
    repr(optimizer)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_the_scale_never_changes_once_measured():
    param, optimizer = fresh()
    gradients = hard_gradients(SHAPE, 30)
    run(param, optimizer, gradients[:1])
    scale = optimizer.state[param]["gsnr"].clone()
    run(param, optimizer, [1e6 * (g + 1) for g in gradients[1:]])
    assert torch.equal(optimizer.state[param]["gsnr"], scale)
