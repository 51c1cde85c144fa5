"""SGD-SaI follows its equations, step by step, with every option."""

import math

import pytest
import torch

from loops import for_each
from reference.compare import SHAPE, STEPS, Closeness, assert_follows
from reference.gradients import hard_gradients, start
from reference.sgd_sai import SGDSaI as Reference
from reference.sgd_sai import signal_to_noise
from steepest import SGDSaI, compat

DTYPES = [torch.float64, torch.float32]


@for_each("dtype", DTYPES)
@for_each(
    "options",
    [
        {},
        {"momentum": 0.5, "weight_decay": 0.0},
        {"momentum": 0.0},
        {"momentum": 0.9, "weight_decay": 0.3, "maximize": True},
        {"eps": 1.0},
        {"eps": 0.3, "relative_eps": True},
        {"max_scale": 0.25},
        {"scale": "sqrt_numel"},
        {"scale": "none"},
    ],
)
def test_sgd_sai(options, dtype):
    assert_follows("sgd_sai", Reference, {"lr": 1e-3, **options}, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batches", [2, 5])
@pytest.mark.parametrize("scale", ["gsnr", "sqrt_numel"])
def test_warmup_batches(batches, scale, dtype):
    options = {"lr": 1e-3, "warmup_batches": batches, "scale": scale}
    assert_follows("sgd_sai", Reference, options, dtype=dtype)


def test_warmup_batches_count_measured_gradients_only():
    gradients = hard_gradients(SHAPE, STEPS)
    gradients[0] = torch.zeros_like(gradients[0])
    gradients[2] = torch.zeros_like(gradients[2])
    options = {"lr": 1e-3, "warmup_batches": 3}
    assert_follows("sgd_sai", Reference, options, gradients=gradients)


def several(count, seed=0):
    """Tensors of different sizes, and for each its gradients of different strength and mean."""
    shapes = [(3, 5), (16,), (40,), (2, 2, 7)][:count]
    begins = [start(shape, seed + i) for i, shape in enumerate(shapes)]
    means = [0.0, 3.0, -1.0, 0.1]
    gradients = [
        [g + mean for g in hard_gradients(shape, STEPS, seed + i)]
        for i, (shape, mean) in enumerate(zip(shapes, means, strict=False))
    ]
    return begins, gradients


@pytest.mark.parametrize("groups", [1, 2])
def test_normalize_divides_by_the_largest_scale_of_all_tensors(groups):
    begins, gradients = several(4)
    params = [torch.nn.Parameter(begin.clone()) for begin in begins]
    made = [params] if groups == 1 else [params[:1], params[1:]]
    optimizer = SGDSaI([{"params": ps} for ps in made], lr=1e-2, normalize="max")
    references = [Reference(begin.flatten().tolist(), lr=1e-2) for begin in begins]
    for param, of_param in zip(params, gradients, strict=True):
        param.grad = of_param[0]
    largest = max(signal_to_noise(of_param[0].flatten().tolist()) for of_param in gradients)
    closeness = Closeness(1e-12)
    for t in range(STEPS):
        for param, of_param in zip(params, gradients, strict=True):
            param.grad = of_param[t]
        optimizer.step()
        for i, (param, reference) in enumerate(zip(params, references, strict=True)):
            reference.divisor = largest
            reference.step(param.grad.flatten().tolist())
            closeness.check(f"parameter {i} after step {t}", str(i), param.detach(), reference.p)


def test_the_largest_scale_counts_the_tensors_measured_so_far():
    small, big = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4))
    optimizer = SGDSaI([small, big], lr=1.0, momentum=0.0, weight_decay=0.0, eps=0.0, normalize="max")
    small.grad = torch.tensor([1.0, -1.0, 1.0, -1.0])  # mean 0: G = √3
    optimizer.step()
    torch.testing.assert_close(small.detach(), -small.grad)
    big.grad = torch.tensor([3.0, 5.0, 3.0, 5.0])  # mean 4, var 4/3: G = √(3 + 4·16·3/4) = √51
    before = small.detach().clone()
    optimizer.step()
    torch.testing.assert_close(small.detach() - before, -small.grad * math.sqrt(3 / 51))
    torch.testing.assert_close(big.detach(), -big.grad)


def test_defaults():
    expected = {
        "lr": 1e-2,
        "momentum": 0.9,
        "eps": 1e-8,
        "weight_decay": 1e-2,
        "weight_decay_method": "decoupled",
        "normalize": "none",
        "scale": "gsnr",
        "warmup_batches": 1,
        "relative_eps": False,
        "max_scale": 10,
    }
    assert SGDSaI([torch.nn.Parameter(torch.zeros(1))]).defaults.items() >= expected.items()


def test_state_is_half_of_adamws():
    param = torch.nn.Parameter(torch.zeros(10_000))
    optimizer = SGDSaI([param])
    param.grad = torch.randn(10_000)
    optimizer.step()
    assert 40_000 <= optimizer.state_bytes() <= 40_000 + 8


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float64, torch.float64),
        (torch.complex128, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("warm_up", [True, False])
def test_the_scale_is_as_precise_as_the_parameter(dtype, kept, warm_up):
    param = torch.nn.Parameter(torch.zeros(5, dtype=dtype))
    optimizer = compat.SGD_sai([param])
    param.grad = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).to(dtype)
    if warm_up:
        optimizer.warmup_step()
    else:
        optimizer.step()
    real = torch.view_as_real(param.grad) if dtype.is_complex else param.grad
    expected = real.double().norm() / (real.double().std() + 1e-8)
    found = optimizer.state[param]["gsnr"]
    assert found.dtype == kept
    assert found.item() == pytest.approx(expected.item(), rel=2 * torch.finfo(kept).eps)
