"""Small steps into bfloat16: lost when rounded to nearest, right on average when rounded stochastically."""

import pytest
import torch

from steepest import SGD, create
from steepest.random import bits32, derive_key, stochastic_round

COUNT, STEPS = 20_000, 40


def walk(optimizer, param, gradient):
    for _ in range(STEPS):
        param.grad = gradient.clone()
        optimizer.step()
    return param.detach().double()


@pytest.mark.parametrize("name", ["lion", "signgsd", "sgd", "sgd_sai", "adamw"])
def test_weight_decay_below_the_grid(name):
    # ηλ = 1e-4 of 1.5, whose spacing is 2⁻⁷: to nearest nothing ever happens.
    options = {"lr": 1e-2, "weight_decay": 1e-2, "weight_decay_method": "decoupled"}
    ends = {}
    for rounding in ("nearest", "stochastic"):
        param = torch.nn.Parameter(torch.full((COUNT,), 1.5, dtype=torch.bfloat16))
        optimizer = create(name, [param], rounding=rounding, **options)
        ends[rounding] = walk(optimizer, param, torch.zeros(COUNT, dtype=torch.bfloat16))
    assert (ends["nearest"] == 1.5).all()
    moved = ends["stochastic"]
    assert abs(float(moved.mean()) - 1.5 * (1 - 1e-4) ** STEPS) < 5 * float(moved.std()) / COUNT**0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_updates_below_the_grid(dtype, direction):
    ends = {}
    spacing = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    for rounding in ("nearest", "stochastic"):
        param = torch.nn.Parameter(torch.full((COUNT,), 1.5, dtype=dtype))
        optimizer = SGD([param], lr=spacing / 10, rounding=rounding)
        ends[rounding] = walk(optimizer, param, torch.full((COUNT,), direction, dtype=dtype))
    assert (ends["nearest"] == 1.5).all()
    moved = (ends["stochastic"] - 1.5) / spacing
    assert torch.equal(moved, moved.round())
    # A sum of STEPS draws of variance 0.1·0.9.
    sigma = (STEPS * 0.09 / COUNT) ** 0.5
    assert abs(float(moved.mean()) + direction * STEPS / 10) < 5 * sigma
    assert float(moved.var()) == pytest.approx(STEPS * 0.09, rel=0.1)


def test_seeds_tensors_and_steps_round_independently():
    def ends(seed):
        params = [torch.nn.Parameter(torch.full((COUNT,), 1.5, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = SGD(params, lr=2.0**-8, rounding="stochastic", seed=seed)
        made = []
        for _ in range(2):
            for param in params:
                param.grad = torch.ones(COUNT, dtype=torch.bfloat16)
                param.data.fill_(1.5)
            optimizer.step()
            made += [(param.detach() < 1.5).double() * 2 - 1 for param in params]
        return made

    drawn = torch.stack(ends(0) + ends(1))  # 2 seeds × 2 steps × 2 tensors, up or down with equal odds
    correlation = drawn @ drawn.T / COUNT - torch.eye(8, dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / COUNT**0.5
    assert float(drawn.mean(1).abs().max()) < 5 / COUNT**0.5
    assert all(torch.equal(a, b) for a, b in zip(ends(0), ends(0), strict=True))


def test_the_noise_is_keyed_by_seed_place_step_and_element():
    # Pinned to the key: were it another, a resumed run would go another way than before an update.
    generator = torch.Generator().manual_seed(0)
    begins = [torch.randn(shape, generator=generator).bfloat16() for shape in [(3,), (5, 7)]]
    params = [torch.nn.Parameter(begin.clone()) for begin in begins]
    optimizer = SGD(params, lr=0.1, rounding="stochastic", seed=11)
    for step in (1, 2, 3):
        gradients = [torch.randn(p.shape, generator=generator).bfloat16() for p in params]
        expected = []
        for ordinal, (param, gradient) in enumerate(zip(params, gradients, strict=True)):
            param.grad = gradient
            exact = param.detach().float() - 0.1 * gradient.float()
            index = torch.arange(param.numel()).view(param.shape)
            bits = bits32(derive_key(11, ordinal, step), index, stream=7)
            expected.append(stochastic_round(exact, torch.bfloat16, bits))
        optimizer.step()
        for param, value in zip(params, expected, strict=True):
            assert torch.equal(param.detach(), value)
