"""Test newton_schulz against the SVD, the scalar polynomials, and itself in other forms and scales."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import steepest
from loops import for_each
from steepest.compile.available import compiler_available
from steepest.linalg import COEFFICIENTS, newton_schulz

NAMES = list(COEFFICIENTS)
MINIMAX = [name for name in NAMES if name.startswith("minimax")]
SHAPES = [(5, 5), (4, 9), (9, 4), (3, 40), (1, 7), (7, 1), (1, 1)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def orthogonal(*shape: int, seed: int = 0) -> Tensor:
    """Draw a matrix with orthonormal columns, [..., m, n] with m ≥ n."""
    return torch.linalg.qr(randn(*shape, seed=seed))[0]


def with_singular_values(s: Tensor, m: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return X = U diag(s) Vᵀ, U and V, in float64."""
    batch, k = s.shape[:-1], s.shape[-1]
    u = orthogonal(*batch, m, k, seed=seed)
    v = orthogonal(*batch, n, k, seed=seed + 1)
    return u * s[..., None, :] @ v.mT, u, v


def scalars(sigma: Tensor, polynomials: tuple[tuple[float, ...], ...]) -> Tensor:
    for polynomial in polynomials:
        sigma = sum(number * sigma ** (2 * power + 1) for power, number in enumerate(polynomial))
    return sigma


def norm(s: Tensor, name: str) -> Tensor:
    """Return the norm by which a set divides matrices with singular values s."""
    order = {"frobenius": 2, "schatten4": 4, "schatten8": 8}[COEFFICIENTS[name].normalization]
    return torch.linalg.vector_norm(s, ord=order)


def error(x: Tensor, y: Tensor) -> float:
    """Return the relative error in the Frobenius norm."""
    return float((x.double() - y.double()).norm() / y.double().norm())


class TestCoefficients:
    def test_table_matches_the_spec(self):
        jordan = (3.4445, -4.7750, 2.0315)
        assert {name: table.triples for name, table in COEFFICIENTS.items() if table.triples} == {
            "jordan": (jordan,) * 5,
            "quintic": (
                (4.0848, -6.8946, 2.9270),
                (3.9505, -6.3029, 2.6377),
                (3.7418, -5.5913, 2.3037),
                (2.8769, -3.1427, 1.2046),
                (2.8366, -3.0525, 1.2012),
            ),
            "polar_express": (
                (8.1566, -22.4833, 15.8788),
                (4.0429, -2.8089, 0.5000),
                (3.8917, -2.7725, 0.5061),
                (3.2858, -2.3681, 0.4645),
                (2.3465, -1.7098, 0.4232),
            ),
            "cans": (
                (8.4703, -25.1081, 18.6293),
                (4.1828, -3.1087, 0.5806),
                (3.9619, -2.9541, 0.5630),
                (3.2866, -2.4647, 0.5074),
                (2.2737, -1.6447, 0.4162),
            ),
            "deepseekv4": (jordan,) * 8 + ((2.0, -1.5, 0.5),) * 2,
        }
        assert {name: table.margin for name, table in COEFFICIENTS.items() if table.margin != 1} == {
            "polar_express": 1.02,
            "minimax_17_17": 1.02,
            "minimax_9_17_3": 1.02,
            "minimax_17_17_3": 1.02,
        }
        assert all(table.source for table in COEFFICIENTS.values())

    @pytest.mark.parametrize("name", sorted(COEFFICIENTS.keys() - {"cans"}))
    def test_bounded_in_bfloat16(self, name):
        """Near 1, where those of low rank come, a polynomial may rise without bound."""
        for seed in range(8):
            generator, rank = torch.Generator().manual_seed(seed), [1, 2, 4, 128][seed % 4]
            x = torch.randn(128, rank, generator=generator) @ torch.randn(rank, 133, generator=generator)
            largest = torch.linalg.matrix_norm(newton_schulz(x, name, dtype=torch.bfloat16).double(), 2)
            assert largest < 1.3

    def test_the_set_that_overflows_in_half_precision_is_computed_in_float32(self):
        """In bfloat16 this matrix reached 4e8 with some seeds, a larger one 2."""
        for seed in range(50):
            x = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed)).bfloat16()
            assert torch.linalg.matrix_norm(newton_schulz(x, "cans").double(), 2) < 1.14
        for half in (torch.bfloat16, torch.float16):
            with pytest.raises(ValueError, match=f"overflow in {half}; use float32"):
                newton_schulz(x, "cans", dtype=half)
            with pytest.raises(ValueError, match=f"overflow in {half}; use float32"):
                steepest.Muon([torch.ones(2, 2)], coefficients="cans", ns_dtype=half)

    def test_table_is_frozen(self):
        with pytest.raises(TypeError):
            COEFFICIENTS["jordan"] = COEFFICIENTS["cans"]  # type: ignore[index]
        with pytest.raises(AttributeError):
            COEFFICIENTS["jordan"].margin = 2.0  # type: ignore[misc]

    @pytest.mark.parametrize("name", NAMES)
    def test_shorter_runs_stop_early(self, name):
        table = COEFFICIENTS[name]
        assert table.schedule(2) == table.polynomials[:2]
        assert table.schedule() == table.schedule(len(table.polynomials)) == table.polynomials

    def test_longer_runs_repeat_the_last_polynomial(self):
        table = COEFFICIENTS["deepseekv4"]
        assert table.schedule(13) == table.polynomials + (table.polynomials[-1],) * 3

    @pytest.mark.parametrize("name", ["polar_express", "cans", "deepseekv4", *MINIMAX])
    def test_longer_runs_stay_in_the_band_and_settle_at_one(self, name):
        """The polynomials of numbers; and the products, of a matrix with some of them as singular values."""
        table, numbers = COEFFICIENTS[name], torch.logspace(-3, 0, 20001, dtype=torch.float64)
        (low, high), length = table.band, len(table.polynomials)
        for more in (0, 1, 2, 6, 11):
            ends = numbers / table.margin
            for polynomial in table.schedule(length + more):
                ends = sum(number * ends ** (2 * at + 1) for at, number in enumerate(polynomial))
            assert low - 0.005 <= ends.min()
            assert ends.max() <= high + 0.005
            polar = newton_schulz(torch.diag(numbers[::500]), name, length + more).diagonal()
            assert polar.max() <= high + 0.005
        assert (ends - 1).abs().max() < 1e-6
        assert (polar[-20:] - 1).abs().max() < 1e-6

    def test_longer_runs_cycle(self):
        assert COEFFICIENTS["jordan"].schedule(12) == (COEFFICIENTS["jordan"].triples[0],) * 12
        quintic = COEFFICIENTS["quintic"].triples
        assert COEFFICIENTS["quintic"].schedule(12) == quintic + quintic + quintic[:2]
        first, second = (1.5, -0.5, 0.0), (2.0, -1.5, 0.5)
        x = randn(3, 5)
        assert torch.equal(
            newton_schulz(x, [first, second], steps=5),
            newton_schulz(x, [first, second, first, second, first]),
        )

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("steps", [1, 4, 7, 13])
    def test_run_follows_its_schedule(self, name, steps):
        table = COEFFICIENTS[name]
        x = randn(4, 5)
        tops = (table.tops + (1.0,) * steps)[:steps] if table.tops else ()
        written_out = dataclasses.replace(
            table, triples=(), polynomials=table.schedule(steps), tops=tops, beyond="cycle"
        )
        assert torch.equal(newton_schulz(x, name, steps), newton_schulz(x, written_out))
        if table.margin == 1:
            assert torch.equal(newton_schulz(x, name, steps), newton_schulz(x, list(table.schedule(steps))))


class TestSingularValues:
    @for_each("form", ["plain", "gram"])
    @for_each(("m", "n"), SHAPES)
    @for_each("name", NAMES)
    def test_polynomials_map_values_and_keep_vectors(self, name, m, n, form):
        s = torch.logspace(-2, 0, min(m, n), dtype=torch.float64) if min(m, n) > 1 else torch.ones(1).double()
        x, u, v = with_singular_values(s, m, n)
        table = COEFFICIENTS[name]
        mapped = scalars(s / (table.margin * norm(s, name)), table.polynomials)
        # The powers of degree 17 have alternating coefficients of up to 5e5.
        assert error(newton_schulz(x, name, form=form), u * mapped @ v.mT) < (1e-9 if table.tops else 1e-11)

    @pytest.mark.parametrize("form", ["plain", "gram"])
    @pytest.mark.parametrize(("dtype", "slack"), [(torch.float64, 0.0), (torch.float32, 1e-3)])
    @pytest.mark.parametrize("name", NAMES)
    def test_band_of_the_table(self, name, dtype, slack, form):
        """σ = (cos θ, sin θ) covers every σ/‖X‖ in [1e-3, 1]; the results just fill the band."""
        small = torch.logspace(-3, math.log10(0.5**0.5), 2000, dtype=torch.float64)
        x, _, _ = with_singular_values(torch.stack([(1 - small**2).sqrt(), small], -1), 2, 4)
        result = torch.linalg.svdvals(newton_schulz(x.float(), name, dtype=dtype, form=form).double())
        low, high = COEFFICIENTS[name].band
        rounding = 0.0055 + slack  # the table gives two decimals
        assert low - rounding <= result.min() <= low + rounding
        assert high - rounding <= result.max() <= high + rounding

    @pytest.mark.parametrize(
        ("dtype", "form", "slack"),
        [
            (torch.bfloat16, "plain", 0.05),
            (torch.bfloat16, "gram", 0.05),
            (torch.float16, "plain", 0.02),
            (torch.float16, "gram", 0.02),
        ],
    )
    @pytest.mark.parametrize("name", ["jordan", "quintic", "polar_express", "deepseekv4"])
    def test_band_in_half_precision(self, name, dtype, form, slack):
        """Random matrices have no small σ/‖X‖_F, so a few bits must suffice for all of them."""
        result = torch.linalg.svdvals(newton_schulz(randn(8, 32, 64).float(), name, dtype=dtype, form=form))
        low, high = COEFFICIENTS[name].band
        assert low - slack <= result.min()
        assert result.max() <= high + slack

    @pytest.mark.parametrize("form", ["plain", "gram"])
    @pytest.mark.parametrize(("dtype", "slack"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
    @pytest.mark.parametrize("name", MINIMAX)
    def test_high_degrees_in_half_precision(self, name, dtype, slack, form):
        """They stay in [0, 1.2], although a polynomial of degree 17 is steep outside of its interval."""
        heavy = randn(16, 64, 128) / randn(16, 64, 128, seed=1).abs().clamp_min(1e-3)
        for x in (randn(8, 32, 64), randn(8, 64, 32), orthogonal(4, 48, 48), heavy, randn(2, 256, 256)):
            exact = newton_schulz(x, name)
            result = newton_schulz(x.float(), name, dtype=dtype, form=form)
            assert torch.linalg.svdvals(result).max() < 1.2 + slack
            assert error(result, exact) < (0.25 if dtype == torch.bfloat16 else 0.06)

    def test_deepseekv4_is_the_polar_factor(self):
        s = torch.logspace(-2.5, 0, 12, dtype=torch.float64)
        x, u, v = with_singular_values(s, 12, 20)
        assert (newton_schulz(x, "deepseekv4") - u @ v.mT).abs().max() < 1e-3
        assert (newton_schulz(x, "deepseekv4", steps=13) - u @ v.mT).abs().max() < 1e-12

    def test_jordan_on_scalars(self):
        """A 1×1 matrix becomes its sign times p(p(p(p(p(1))))), with p(1) = 3.4445 − 4.7750 + 2.0315."""
        sigma = 1.0
        for steps, known in [(1, 0.7010), (2, None), (3, None), (4, None), (5, None)]:
            sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
            assert known is None or sigma == pytest.approx(known, abs=1e-12)
            for value in (2.5, -2.5, 1e-200, -1e200):
                x = torch.tensor([[value]], dtype=torch.float64)
                out = newton_schulz(x, "jordan", steps)
                assert out.item() == pytest.approx(math.copysign(sigma, value), abs=1e-13)

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize(("m", "n"), [(6, 6), (4, 11), (11, 4)])
    def test_orthogonal_matrices_only_change_scale(self, name, m, n):
        q = orthogonal(max(m, n), min(m, n))
        q = q if m >= n else q.mT
        table = COEFFICIENTS[name]
        one = 1 / (table.margin * norm(torch.ones(min(m, n)).double(), name))
        result = newton_schulz(7.0 * q, name)
        assert torch.allclose(
            result, scalars(one, table.polynomials) * q, atol=2e-12 if table.tops else 1e-13
        )

    @pytest.mark.parametrize("form", ["plain", "gram"])
    def test_rank_deficient(self, form):
        s = torch.tensor([1.0, 0.5, 0.2, 0.0, 0.0, 0.0]).double()
        x, u, v = with_singular_values(s, 6, 10)
        mapped = scalars(s / s.norm(), COEFFICIENTS["quintic"].triples)
        result = newton_schulz(x, "quintic", form=form)
        assert error(result, u * mapped @ v.mT) < 1e-12
        assert torch.linalg.svdvals(result)[3:].max() < 1e-12
        result = newton_schulz(x.float(), "quintic", form=form).double()
        assert error(result, u * mapped @ v.mT) < 1e-4

    @pytest.mark.parametrize(("m", "n"), SHAPES)
    def test_svd_method_returns_the_exact_polar_factor(self, m, n):
        s = torch.logspace(-6, 0, min(m, n), dtype=torch.float64) if min(m, n) > 1 else torch.ones(1).double()
        x, u, v = with_singular_values(s, m, n)
        assert error(newton_schulz(1e20 * x, method="svd"), u @ v.mT) < 1e-9
        result = newton_schulz(randn(m, n, dtype=torch.float32), method="svd")
        small = result if m <= n else result.mT
        assert torch.allclose(small @ small.mT, torch.eye(min(m, n)), atol=1e-5)
        assert result.dtype == torch.float32

    def test_svd_method_keeps_null_directions_zero(self):
        s = torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0]).double()
        x, u, v = with_singular_values(s, 5, 8)
        expected = u[:, :3] @ v[:, :3].mT
        assert error(newton_schulz(x, method="svd"), expected) < 1e-14
        assert error(newton_schulz(x.float(), method="svd"), expected) < 1e-5
        batch = torch.stack([x, torch.zeros_like(x)])
        assert torch.equal(newton_schulz(batch, method="svd")[1], torch.zeros(5, 8).double())

    def test_svd_method_computes_in_float32_or_better(self):
        x = randn(4, 6, dtype=torch.bfloat16)
        exact = newton_schulz(x.float(), method="svd")
        assert torch.equal(newton_schulz(x, method="svd", dtype=torch.bfloat16), exact.bfloat16())
        x = x.float()
        precise = newton_schulz(x.double(), method="svd")
        assert torch.equal(newton_schulz(x, method="svd", dtype=torch.float64), precise.float())


class TestSymmetries:
    @for_each("method", ["newton_schulz", "svd"])
    @for_each(("m", "n"), SHAPES)
    @for_each("name", NAMES)
    def test_equivariance(self, name, m, n, method):
        x, u, v = randn(m, n), orthogonal(m, m, seed=1), orthogonal(n, n, seed=2)
        rotated = newton_schulz(u @ x @ v, name, method=method)
        assert error(rotated, u @ newton_schulz(x, name, method=method) @ v) < 1e-11

    @for_each(("m", "n"), SHAPES)
    @for_each("name", NAMES)
    def test_transposition(self, name, m, n):
        x = randn(2, m, n)
        assert error(newton_schulz(x.mT, name), newton_schulz(x, name).mT) < 1e-12

    def test_odd(self):
        x = randn(4, 6, dtype=torch.float32)
        assert torch.equal(newton_schulz(-x), -newton_schulz(x))

    @pytest.mark.parametrize("method", ["newton_schulz", "svd"])
    @pytest.mark.parametrize(("m", "n"), [(6, 6), (5, 17), (17, 5), (1, 9)])
    def test_scale(self, m, n, method):
        x = randn(m, n, dtype=torch.float32)
        x = x / x.abs().max()
        base = newton_schulz(x, method=method)
        for power in (-100, -24, 24, 100):
            assert torch.equal(newton_schulz(x * 2.0**power, method=method), base)
        for scale in (1e-35, 1e-30, 1e-12, 1e12, 1e30, 3.4e38):
            assert torch.allclose(newton_schulz(x * scale, method=method), base, atol=3e-5)

    @pytest.mark.parametrize("shape", [(2, 256, 300), (300, 256)], ids=str)
    def test_scale_of_large_matrices(self, shape):
        """Norms whose squares are safe are used as they are; the bits do not tell."""
        x = randn(*shape, dtype=torch.float32)
        base = newton_schulz(x)
        for power in (-120, -100, -41, -24, 24, 41, 100):
            assert torch.equal(newton_schulz(x * 2.0**power), base)
        mixed = torch.stack([x * 1e-30, torch.zeros_like(x), x])
        result = newton_schulz(mixed)
        assert torch.equal(result[1], mixed[1])
        assert error(result[0], base) < 0.01  # bfloat16 on some machines
        assert error(result[2], base) < 0.01

    def test_scale_in_half_precision(self):
        x = randn(6, 12, dtype=torch.float32)
        x = (x / x.abs().max()).bfloat16()
        assert torch.equal(newton_schulz(x * 2.0**-100), newton_schulz(x))
        x = x.half()
        assert torch.equal(newton_schulz(x * 2.0**-5), newton_schulz(x))

    @pytest.mark.parametrize("form", ["plain", "gram"])
    @pytest.mark.parametrize("method", ["newton_schulz", "svd"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_zero_stays_zero(self, dtype, method, form):
        zero = torch.zeros(2, 3, 5, dtype=dtype)
        for name in NAMES:
            assert torch.equal(newton_schulz(zero, name, method=method, form=form), zero)

    @pytest.mark.parametrize("method", ["newton_schulz", "svd"])
    @pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (0, 4, 5), (2, 0, 5), (2, 0, 3, 4)])
    def test_empty(self, shape, method):
        result = newton_schulz(torch.empty(shape), method=method)
        assert result.shape == shape
        assert result.dtype == torch.float32


class TestBatches:
    @pytest.mark.parametrize("form", ["plain", "gram"])
    @pytest.mark.parametrize(("m", "n"), [*SHAPES, (24, 70)])
    def test_batched_equals_looped(self, m, n, form):
        """The results need not be bitwise equal: batched products may sum in another order."""
        x = randn(3, 2, m, n, dtype=torch.float32) * torch.tensor([1e-20, 1.0, 1e20])[:, None, None, None]
        batched = newton_schulz(x, form=form)
        looped = torch.stack([torch.stack([newton_schulz(each, form=form) for each in row]) for row in x])
        assert torch.allclose(batched, looped, atol=1e-5)
        double = newton_schulz(x.double(), form=form)
        looped = torch.stack([newton_schulz(row, form=form) for row in x.double()])
        assert torch.allclose(double, looped, atol=1e-13)

    def test_svd_batched_equals_looped(self):
        x = randn(2, 3, 4, 6)
        looped = torch.stack([torch.stack([newton_schulz(each, method="svd") for each in row]) for row in x])
        assert torch.allclose(newton_schulz(x, method="svd"), looped, atol=1e-13)

    def test_layouts(self):
        x = randn(4, 6, 5, dtype=torch.float32)
        for view in (x.mT, x.permute(1, 2, 0), x[:, ::2], x.expand(2, 4, 6, 5)):
            assert torch.allclose(newton_schulz(view), newton_schulz(view.contiguous()), atol=1e-6)

    @pytest.mark.parametrize("method", ["newton_schulz", "svd"])
    @pytest.mark.parametrize("form", ["plain", "gram"])
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_nonfinite_matrices_become_nan_without_affecting_others(self, bad, form, method):
        x = randn(3, 4, 9, dtype=torch.float32)
        clean = newton_schulz(x, form=form, method=method)
        x[1, 2, 3] = bad
        result = newton_schulz(x, form=form, method=method)
        assert result[1].isnan().all()
        assert torch.allclose(result[[0, 2]], clean[[0, 2]], atol=1e-6)

    def test_operand_is_not_modified(self):
        x = randn(3, 4, 6, dtype=torch.float32)
        before = x.clone()
        newton_schulz(x)
        newton_schulz(x, method="svd")
        assert torch.equal(x, before)

    def test_shapes_on_the_meta_device(self):
        result = newton_schulz(torch.empty(2, 6, 4, dtype=torch.bfloat16, device="meta"))
        assert result.shape == (2, 6, 4)
        assert result.dtype == torch.bfloat16


class TestGram:
    @for_each(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 3e-4), (torch.float16, 0.1)])
    @for_each("spectrum", ["random", "spread"])
    @for_each("steps", [1, 2, 3, 5, 6, 10])
    @for_each("name", NAMES)
    def test_gram_form_equals_plain_form(self, name, steps, spectrum, dtype, tolerance):
        """Compare with the plain form in float64. Beyond some tables, steep steps amplify rounding errors."""
        steps = min(steps, {"quintic": 5, "minimax_17_17": 2}.get(name, steps))
        if not COEFFICIENTS[name].half_precision and dtype == torch.float16:
            dtype, tolerance = torch.float32, 3e-4
        if spectrum == "random":
            x = randn(2, 16, 48)
        else:
            x = with_singular_values(torch.logspace(-2.5, 0, 16).double().expand(2, 16), 16, 48)[0]
        plain = newton_schulz(x, name, steps, form="plain")
        gram = newton_schulz(x, name, steps, form="gram", dtype=dtype)
        assert error(gram, plain) < tolerance

    @pytest.mark.parametrize("name", ["jordan", "quintic", "polar_express"])
    def test_gram_form_equals_plain_form_in_bfloat16(self, name):
        """The forms agree within bfloat16's precision for these sets (see newton_schulz's docstring)."""
        x = randn(2, 16, 48)
        plain = newton_schulz(x, name, form="plain")
        assert error(newton_schulz(x, name, form="plain", dtype=torch.bfloat16), plain) < 0.05
        assert error(newton_schulz(x, name, form="gram", dtype=torch.bfloat16), plain) < 0.15

    @pytest.mark.parametrize(("r", "n"), [(8, 8), (8, 12), (8, 13), (8, 64), (16, 24)])
    @pytest.mark.parametrize("steps", [2, 3, 5, 8, 10])
    def test_auto_needs_the_fewest_flops(self, r, n, steps):
        def flops(form):
            with FlopCounterMode(display=False) as counter:
                newton_schulz(randn(r, n), "jordan", steps, form=form)
            return counter.get_total_flops()

        assert flops("auto") == min(flops("plain"), flops("gram"))
        assert flops("plain") == steps * (4 * r**2 * n + 2 * r**3)
        if steps == 5:
            assert flops("gram") == 8 * r**2 * n + 28 * r**3

    @pytest.mark.parametrize("spectrum", ["random", "spread"])
    @pytest.mark.parametrize("name", [n for n in NAMES if COEFFICIENTS[n].gram_in_bfloat16])
    def test_gram_form_is_as_accurate_as_plain_form_in_bfloat16(self, name, spectrum):
        """The Gram form does not overshoot more; with over two iterations per R it would."""
        x = randn(2, 64, 192)
        if spectrum == "spread":
            x = with_singular_values(torch.logspace(-2.5, 0, 64).double().expand(2, 64), 64, 192)[0]
        exact = newton_schulz(x, name, form="plain")
        plain, gram = (newton_schulz(x, name, form=form, dtype=torch.bfloat16) for form in ("plain", "gram"))
        assert error(gram, exact) < 1.5 * error(plain, exact) + 0.02
        assert torch.linalg.svdvals(gram).max() < torch.linalg.svdvals(plain).max() + 0.15

    @pytest.mark.parametrize("spectrum", ["random", "heavy-tailed", "decaying", "low rank and noise"])
    def test_a_first_run_of_three_is_as_accurate_in_bfloat16(self, spectrum):
        """Three iterations with one R, and a restart after them; without the restart σ reaches 10 or more."""
        x = randn(128, 300)
        if spectrum == "heavy-tailed":
            x = x / randn(128, 300, seed=1)
        if spectrum == "decaying":
            x = with_singular_values(torch.logspace(-5, 0, 128).double(), 128, 300)[0]
        if spectrum == "low rank and noise":
            x = randn(128, 4) @ randn(4, 300, seed=1) + 0.01 * x
        assert COEFFICIENTS["jordan"].first_run == 3
        exact = newton_schulz(x, method="svd")
        errors, tops = {}, {}
        for form in ("plain", "gram"):
            found = newton_schulz(x, "jordan", form=form, dtype=torch.bfloat16)
            errors[form] = error(found, exact)
            tops[form] = float(torch.linalg.svdvals(found).max())
        assert errors["gram"] < errors["plain"] + 0.01
        assert tops["gram"] < tops["plain"] + 0.05

    def test_auto_uses_gram_in_bfloat16_for_the_named_sets(self):
        x = randn(4, 64, dtype=torch.float32)
        custom = COEFFICIENTS["jordan"].triples
        for coefficients, form in (("quintic", "gram"), (custom, "plain")):
            auto, expected = (
                newton_schulz(x, coefficients, dtype=torch.bfloat16, form=f) for f in ("auto", form)
            )
            assert torch.equal(auto, expected)


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_result_has_the_operands_dtype(self, dtype):
        x = randn(4, 6, dtype=dtype)
        for computing in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert newton_schulz(x, dtype=computing).dtype == dtype

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_float32_on_the_cpu(self, dtype):
        x = randn(4, 6, dtype=dtype)
        assert torch.equal(newton_schulz(x), newton_schulz(x.float()).to(dtype))

    def test_computing_dtype_is_used(self):
        x = randn(8, 9, dtype=torch.float32)
        in_double = newton_schulz(x, dtype=torch.float64)
        assert torch.equal(in_double, newton_schulz(x.double()).float())
        assert error(newton_schulz(x), in_double) < 1e-5
        assert 1e-3 < error(newton_schulz(x, dtype=torch.bfloat16), in_double) < 0.05

    def test_none_means_half_precision_where_it_is_faster(self, monkeypatch):
        module = importlib.import_module("steepest.linalg.newton_schulz_ways")
        choose = functools.partial(module._computing_dtype, rows=128)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
        assert choose(torch.float32, "cuda", by_gram=False) == torch.bfloat16
        assert choose(torch.float32, "cuda", by_gram=True) == torch.float16
        assert choose(torch.bfloat16, "cuda", by_gram=True) == torch.float16
        assert choose(torch.float16, "cuda", by_gram=False) == torch.float16
        assert choose(torch.float64, "cuda", by_gram=False) == torch.float64
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
        assert choose(torch.bfloat16, "cuda", by_gram=False) == torch.float32
        for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
            monkeypatch.setattr(module, "cpu_multiplies_bfloat16", lambda has=has: has)
            assert choose(torch.float32, "cpu", by_gram=False) == expected
            assert choose(torch.float16, "cpu", by_gram=True) == expected
            assert choose(torch.float64, "cpu", by_gram=True) == torch.float64
            assert choose(torch.float32, "cpu", by_gram=True, rows=127) == torch.float32


class TestErrors:
    def test_unknown_name_suggests_the_closest(self):
        with pytest.raises(
            ValueError, match=r"'polarexpress' \(did you mean 'polar_express'\?\); known: jor"
        ):
            newton_schulz(torch.ones(2, 2), "polarexpress")

    @pytest.mark.parametrize("steps", [0, -1, 2.0, True, "5"])
    def test_invalid_steps(self, steps):
        with pytest.raises(ValueError, match="steps must be None or an integer ≥ 1"):
            newton_schulz(torch.ones(2, 2), steps=steps)

    @pytest.mark.parametrize(
        "triples",
        [[], [(1.0,)], [(1.0, 2.0, 3.0, 4.0)], [(1.0, 2.0, math.nan)], [(1.0, 2.0, "3")], [1.0, 2.0, 3.0]],
    )
    def test_invalid_triples(self, triples):
        with pytest.raises(ValueError, match=r"triples \(a, b, c\) of finite numbers"):
            newton_schulz(torch.ones(2, 2), triples)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"form": "gramm"}, "form must be one of 'auto', 'plain', 'gram', got 'gramm'"),
            ({"method": "qr"}, "method must be 'newton_schulz' or 'svd', got 'qr'"),
            ({"dtype": torch.int32}, "dtype must be one of"),
            ({"normalization": "schatten6"}, "normalization must be one of 'frobenius', 'schatten4', 'sch"),
            ({"eps": 0.0}, "eps must be > 0"),
            ({"eps": math.nan}, "eps must be > 0"),
            ({"method": "svd", "steps": 0}, "steps must be"),
            ({"method": "svd", "coefficients": "jordn"}, "unknown coefficients"),
        ],
    )
    def test_invalid_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            newton_schulz(torch.ones(2, 2), **options)

    @pytest.mark.parametrize("x", [torch.tensor(1.0), torch.ones(3)])
    def test_too_few_dimensions(self, x):
        with pytest.raises(ValueError, match=r"needs matrices \[..., m, n\]"):
            newton_schulz(x)

    @pytest.mark.parametrize("x", [torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2) * 1j, [[1.0]]])
    def test_unsupported_types(self, x):
        with pytest.raises(TypeError, match="newton_schulz needs"):
            newton_schulz(x)


def test_compiles_without_graph_breaks():
    x = randn(2, 6, 20, dtype=torch.float32)
    backend = "inductor" if compiler_available("cpu") else "aot_eager"
    compiled = torch.compile(newton_schulz, fullgraph=True, backend=backend)
    assert torch.allclose(compiled(x, "cans"), newton_schulz(x, "cans"), atol=1e-4)
    for options in ({"coefficients": [(1.5, -0.5, 0.0)], "steps": 3}, {"form": "plain"}, {"method": "svd"}):
        compiled = torch.compile(newton_schulz, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x, **options), newton_schulz(x, **options), atol=1e-4)
