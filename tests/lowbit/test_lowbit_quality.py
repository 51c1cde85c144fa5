"""What one-byte averages do to directions, on real gradients and where other formats fail, which is shown.

A twin is given an optimizer's gradients, takes a step of length 1 without decay, and is put back: its
displacement is the direction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.formats import int8
from steepest.lab.tasks.text import text_task
from steepest.rule import StateSpec

Encode = Callable[..., tuple[Tensor, Tensor]]


@contextlib.contextmanager
def patched(**functions: Callable[..., Any]) -> Iterator[None]:
    """Encode and decode otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        for name, function in functions.items():
            patch.setattr(int8, name, function)
        yield


def with_float16_scales(encode: Encode) -> Encode:
    def encoded(*given: Any) -> tuple[Tensor, Tensor]:
        codes, scale = encode(*given)
        return codes, scale.half().float()

    return encoded


def nearest_from_zero(values: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """The nearest code, which may be 0 where v is not."""
    scale = values.amax(-1)
    roots = (values / scale.unsqueeze(-1).clamp_min(1e-38)).pow(0.25)
    return (255 * roots).round().to(torch.uint8), scale


def nearest(values: Tensor, noise: Tensor | None, encode: Encode = int8.encode_nonnegative) -> Any:
    return encode(values, None)


def over_columns(function: Callable[..., Any]) -> Callable[..., Any]:
    """Blocks of elements below each other, for a matrix of one block in each of 64 rows."""

    def turn(value: Tensor) -> Tensor:
        # There are 64 scales either way.
        return value if value.numel() == 64 else value.reshape(64, 64).t().reshape(value.shape)

    def turned(*given: Any) -> Any:
        made = function(*(each if each is None else turn(each) for each in given))
        return tuple(map(turn, made)) if isinstance(made, tuple) else turn(made)

    return turned


class Twin:
    """An optimizer of copies of parameters, which gives directions."""

    def __init__(self, name: str, params: list[Tensor], **options: Any) -> None:
        self.params = [nn.Parameter(torch.zeros_like(param)) for param in params]
        self.optimizer = steepest.create(
            name, self.params, lr=1.0, weight_decay=0.0, compile=False, **options
        )

    def directions(self, grads: list[Tensor]) -> list[Tensor]:
        """Return −p after a step from 0."""
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
        self.optimizer.step()
        found = [-param.detach().clone() for param in self.params]
        for param in self.params:
            param.data.zero_()
        return found


def test_lions_signs_are_float32s_on_text():
    """400 steps; scales of float16 are 0 where gradients are small, and agree as no memory at all does."""
    task = text_task(width=64, depth=1)
    torch.manual_seed(0)
    model = task.make(0)
    params = list(model.parameters())
    optimizer = steepest.Lion(params, lr=3e-4)
    exact, coded = Twin("lion", params), Twin("lion", params, state_dtype="int8")
    # Gradients as small as those of a large batch, or behind a loss that is scaled down.
    small, rounded = (Twin("lion", params, state_dtype="int8") for _ in range(2))
    agree, weights = torch.zeros(4, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    float16 = with_float16_scales(int8.encode_signed)
    matrices = [at for at, param in enumerate(params) if param.dim() > 1]
    count = 0
    batches = iter(task.batches(0))
    for _ in range(400):
        optimizer.zero_grad()
        task.loss(model, next(batches)).backward()
        grads = [param.grad.clone() for param in params]
        averages = [exact.optimizer.state[p].get("exp_avg", torch.zeros(())).clone() for p in exact.params]
        found = exact.directions([grad.clone() for grad in grads])
        others = [coded.directions([grad.clone() for grad in grads])]
        others.append(small.directions([grad * 2**-20 for grad in grads]))
        with patched(encode_signed=float16):
            others.append(rounded.directions([grad * 2**-20 for grad in grads]))
        for at in matrices:
            size = (0.9 * averages[at] + 0.1 * grads[at]).abs().double()
            same = [other[at] == found[at] for other in (*others, [grad.sign() for grad in grads])]
            agree += torch.stack([each.double().sum() for each in same])
            weights += torch.stack([*((each * size).sum() for each in same), size.sum()])
            count += found[at].numel()
        optimizer.step()
    share, weighted = agree / count, weights[:-1] / weights[-1]
    assert share[0] >= 0.98
    assert weighted[0] >= 0.999
    assert torch.equal(share[1], share[0])
    no_memory = float(share[3])
    assert no_memory < 0.85
    assert float(share[2]) == pytest.approx(no_memory, abs=0.01)


def rare_gradients(step: int) -> Tensor:
    """An embedding's: in each row few elements are large, and most are tiny or not there."""
    draw = torch.Generator().manual_seed(step)
    values = torch.randn(64, 64, generator=draw) * torch.logspace(-7, 0, 64)
    return values * (torch.rand(64, 64, generator=draw) < 0.1)


def largest(**functions: Callable[..., Any]) -> float:
    twin = Twin("adamw", [torch.zeros(64, 64)], state_dtype="int8")
    most = 0.0
    with patched(**functions):
        for step in range(50):
            most = max(most, float(twin.directions([rare_gradients(step)])[0].abs().max()))
    return most


def test_no_direction_explodes_where_an_average_is_tiny():
    """float32's are at most 1 here. The least codes are a/127² and √a/255², of which the ratio is 4."""
    assert largest() < 8
    assert largest(encode_nonnegative=nearest_from_zero) > 1000


def relative_error(**functions: Callable[..., Any]) -> float:
    """AdamW's directions beside float32's, where rows' gradients differ by ten million."""
    sizes = torch.logspace(-7, 0, 64).unsqueeze(1)
    exact = Twin("adamw", [torch.zeros(64, 64)], eps=0.0)
    twin = Twin("adamw", [torch.zeros(64, 64)], eps=0.0, state_dtype="int8")
    error = 0.0
    for step in range(20):
        grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(step)) * sizes
        (wanted,) = exact.directions([grad.clone()])
        with patched(**functions):
            (found,) = twin.directions([grad.clone()])
        error = max(error, float((found - wanted).norm(dim=1).div(wanted.norm(dim=1)).max()))
    return error


def test_rows_of_any_size_keep_their_directions():
    assert relative_error() < 0.1
    names = ("encode_signed", "encode_nonnegative", "decode")
    assert relative_error(**{name: over_columns(getattr(int8, name)) for name in names}) > 0.5


def second_average(**functions: Callable[..., Any]) -> float:
    """√v̂ over √v after 1,000 steps; gradients are larger in the first ten, and one in each row always."""
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = steepest.AdamW([weight], lr=0.0, weight_decay=0.0, state_dtype="int8", compile=False)
    exact = torch.zeros(64, 64, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    with patched(**functions):
        for step in range(1000):
            weight.grad = (0.5 + torch.rand(64, 64, generator=draw)) * (3.0 if step < 10 else 1.0)
            weight.grad[:, 0] = 3.0
            optimizer.step()
            exact = 0.999 * exact + 0.001 * weight.grad.double() ** 2
    state = optimizer.state[weight]
    found = int8.decode(state["exp_avg_sq"].view(64, 1, 64), state["exp_avg_sq_scale"]).view(64, 64)
    return float((found.double().sqrt() / exact.sqrt()).mean())


def test_the_second_average_is_unbiased_over_a_thousand_steps():
    """A thousandth is below a code: rounded to nearest, averages stay where they are."""
    assert second_average() == pytest.approx(1, abs=0.01)
    assert abs(second_average(encode_nonnegative=nearest) - 1) > 0.2


@pytest.mark.parametrize("power", [-27, 27])
def test_adamws_steps_do_not_depend_on_the_gradients_size(power: int):
    """Without eps they are the same bits for powers of two."""
    runs = [Twin("adamw", [torch.zeros(64, 64)], eps=0.0, state_dtype="int8") for _ in range(2)]
    for step in range(5):
        grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
        (one,), (other,) = (
            twin.directions([grad * factor]) for twin, factor in zip(runs, (1.0, 2.0**power), strict=True)
        )
        assert torch.equal(one, other)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(*(twin.optimizer.state[twin.params[0]][name] for twin in runs))


def slow_average(name: str, entry: str, noise: float, **options: Any) -> float:
    """The cosine to float32's average after the mean gradient has changed."""
    means = [torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    twins = []
    for state_dtype in (torch.float32, "int8"):
        weight = nn.Parameter(torch.zeros(64, 64))
        draw = torch.Generator().manual_seed(0)
        optimizer = steepest.create(name, [weight], lr=0.0, state_dtype=state_dtype, compile=False, **options)
        for step in range(2000):
            weight.grad = means[step >= 1000] + noise * torch.randn(64, 64, generator=draw)
            optimizer.step()
        state = optimizer.state[weight]
        if state_dtype == "int8":
            twins.append(int8.decode(state[entry].view(64, 1, 64), state[entry + "_scale"]).flatten())
        else:
            twins.append(state[entry].flatten())
    return float(nn.functional.cosine_similarity(*twins, dim=0))


@pytest.mark.parametrize(
    ("name", "entry", "options"),
    [
        ("ademamix", "exp_avg_slow", {}),
        ("lion", "exp_avg", {"betas": (0.9, 0.999)}),
        ("signum", "momentum_buffer", {"momentum": 0.999}),
    ],
)
def test_averages_over_thousands_of_steps_keep_their_direction(
    name: str, entry: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    assert slow_average(name, entry, 3.0, **options) > 0.97
    monkeypatch.setattr(StateSpec, "coded", property(lambda spec: spec.range))
    assert slow_average(name, entry, 3.0, **options) < 0.9


def test_averages_of_a_hundred_steps_draw_no_noise():
    assert slow_average("lion", "exp_avg", 3.0) > 0.99
