"""Sums of gradients: exact integers, whatever the order, the cut, the strides and the code that sums."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import steepest
from steepest.compile.available import compiler_available
from steepest.engine import reductions, sums
from steepest.engine.sums import Summand, moments
from strategies import bounded

WIDEST = {torch.float32: 32, torch.float64: 64, torch.bfloat16: 32}


def moments_of(grad: Tensor, **how: bool) -> tuple[int, Tensor, Tensor]:
    [found] = moments([Summand(grad, grad, **how)])
    return found


@st.composite
def gradients(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(list(WIDEST)))
    numbers = st.floats(-(2.0**100), 2.0**100, width=WIDEST[dtype])
    return torch.tensor(draw(st.lists(numbers, max_size=40)), dtype=dtype)


def assert_sums_are(grad: Tensor, total: Tensor, square: Tensor) -> None:
    """Each element is rounded to a multiple of the unit, each square of float64 to 53 bits first."""
    values = [Fraction(value) for value in grad.double().flatten().tolist()]
    count, largest = len(values), grad.double().abs().max().item() if values else 0.0
    exponent, bits = math.frexp(largest)[1], min(62 - math.ceil(math.log2(max(count, 1))), 50)
    for power, found in ((1, total.item()), (2, square.item())):
        unit = Fraction(2) ** max(power * exponent - bits, -1022)
        terms = [value**power for value in values]
        rounded = sum(map(abs, terms)) / 2**52
        assert abs(Fraction(found) - sum(terms)) <= count * unit / 2 + rounded


@bounded
@given(gradients())
def test_the_error_is_half_a_unit_an_element(grad: Tensor):
    count, total, square = moments_of(grad)
    assert count == grad.numel()
    assert_sums_are(grad, total, square)


@bounded
@given(gradients(), st.integers(1, 41), st.randoms(use_true_random=False))
def test_neither_order_nor_chunks_change_a_bit(grad: Tensor, chunk: int, random):
    order = random.sample(range(grad.numel()), grad.numel())
    expected = moments_of(grad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "_CHUNK_ON_CPU", chunk)
        assert moments_of(grad[order]) == expected


@pytest.mark.parametrize("limit", [1, 7, 50, 64])
def test_strides_change_no_bit(limit: int, monkeypatch: pytest.MonkeyPatch):
    grad = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)).permute(1, 2, 0)
    expected = moments_of(grad.contiguous()), moments_of(grad[1:, ::2].contiguous())
    monkeypatch.setattr(sums, "_CHUNK_ON_CPU", limit)
    assert (moments_of(grad), moments_of(grad[1:, ::2])) == expected


@pytest.mark.parametrize("spike", [0.0, 217.0])
def test_the_error_over_many_elements(spike: float):
    grad = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    grad[5] = spike
    exact = math.fsum(value * value for value in grad.tolist())
    assert moments_of(grad)[2].item() == pytest.approx(exact, rel=3e-10 if spike else 3e-13, abs=0)
    assert moments_of(grad)[1].item() == pytest.approx(math.fsum(grad.tolist()), rel=3e-10, abs=0)


@pytest.mark.parametrize(
    ("values", "dtype", "total", "square"),
    [
        ([], torch.float32, 0, 0),
        ([0.0, -0.0], torch.float32, 0, 0),
        ([-3.0], torch.float32, -3, 9),
        ([1e-45, 1e-45, 3e-45], torch.float32, 4 * 2.0**-149, 6 * 2.0**-298),
        ([2.0**127, -(2.0**126)], torch.float32, 2.0**126, 1.25 * 2.0**254),
        ([2.0**996, 2.0**996], torch.float64, 2.0**997, math.nan),
        ([2.0**-600, 2.0**-601], torch.float64, 1.5 * 2.0**-600, 0),
        ([1.0, math.inf], torch.float32, math.nan, math.nan),
        ([1.0, -math.inf, math.inf], torch.bfloat16, math.nan, math.nan),
        ([math.nan, 1.0], torch.float64, math.nan, math.nan),
    ],
)
def test_extreme_values(values: list[float], dtype: torch.dtype, total: float, square: float):
    found = moments_of(torch.tensor(values, dtype=dtype))
    assert [each.item() for each in found[1:]] == pytest.approx([total, square], rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_code_gives_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    shapes = [(300, 7), (), (0,), (5,), (1 << 17,), (9, 4)]
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    grads += [grads[0][::2, ::3], grads[3].double(), torch.full((3,), math.nan, dtype=dtype)]
    eager = moments([Summand(grad, grad, total=False) for grad in grads])
    served: list[int] = []
    real = sums.sum_squares_compiled

    def counted(*given: list[Tensor]) -> dict[int, Tensor]:
        found = real(*given)
        served.extend(found)
        return found

    monkeypatch.setattr(sums, "sum_squares_compiled", counted)
    compiled = moments([Summand(grad, grad, total=False, compiled=True) for grad in grads])
    assert [m.square.item() for m in compiled] == pytest.approx(
        [m.square.item() for m in eager], rel=0, abs=0, nan_ok=True
    )
    # Neither empty, nor with gaps, nor float64.
    assert served == [0, 1, 3, 4, 5, 8]


class Seen(Exception):
    """What a step wants to sum."""


@pytest.mark.skipif(not compiler_available("cpu"), reason="needs a compiler")
@pytest.mark.parametrize(
    ("rule", "total", "compiled"), [("simba_leaky", False, True), ("sgd_sai", True, False)]
)
def test_what_is_measured_in_every_step_is_compiled(
    rule: str, total: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
):
    def moments(summands: list[Summand]) -> None:
        raise Seen(*[each[2:4] for each in summands])

    monkeypatch.setattr(reductions, "moments", moments)
    for option in (True, False, None):
        param = torch.nn.Parameter(torch.ones(4))
        param.grad = torch.ones(4)
        with pytest.raises(Seen) as seen:
            steepest.create(rule, [param], compile=option).step()
        assert seen.value.args == ((total, compiled and option is True),)
