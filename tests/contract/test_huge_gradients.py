"""Finite gradients up to the largest number: they leave parameters finite, however the step runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from loops import for_each
from steepest import AdamW, Hyperball
from steepest.arithmetic import exact_sqrt
from steepest.compile.available import compiler_available
from steepest.registry import optimizer_class

from .cases import CASES, RULES, Case, by_id, spread
from .training import gradient

# Their second moments are averages of squares.
SQUARES = ("adamw", "ademamix", "soap")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def _second_step(rule: Case, dtype: torch.dtype) -> tuple[Tensor, torch.optim.Optimizer]:
    """Return how far a gradient of 1e38 moves a matrix after a step with a normal one."""
    param = rule.params(dtype)[0]
    optimizer = rule.make([param])
    for step, size in enumerate((1.0, 1e38)):
        before = param.detach().clone()
        # The same in both dtypes.
        param.grad = (gradient(torch.zeros_like(param, dtype=torch.float64), 0, step).float() * size).to(
            dtype
        )
        optimizer.step()
    return before - param.detach(), optimizer


@pytest.mark.parametrize("rule", [each for each in RULES if each.name not in SQUARES], ids=by_id)
def test_it_is_taken_as_in_float64(rule: Case):
    moved, optimizer = _second_step(rule, torch.float32)
    exact, _ = _second_step(rule, torch.float64)
    assert (moved - exact).norm() <= 2e-5 * exact.norm()
    for state in optimizer.state.values():
        assert all(entry.isfinite().all() for entry in state.values())


@pytest.mark.parametrize("rule", [each for each in RULES if each.name in SQUARES], ids=by_id)
def test_rules_that_square_it_say_so_and_stand_still(rule: Case):
    """As torch's AdamW: an infinite second moment divides everything to nothing."""
    assert "1.8e19" in (optimizer_class(rule.name).__doc__ or "")
    param = rule.params(torch.float32)[1]  # a vector, which SOAP does not rotate
    optimizer = rule.make([param], weight_decay=0.0)
    moved = []
    for size in (1.0, 1.0, 1e30, 1.0, 1.0):
        before = param.detach().clone()
        param.grad = torch.full_like(param, size)
        optimizer.step()
        moved.append(not torch.equal(param.detach(), before))
    assert moved == [rule.name != "soap", True, False, False, False]


def test_half_precision_is_finite_where_torch_is():
    """float16 loses averages of squares from gradients of 8,094 on, which loss scaling makes common."""
    for size in (8000.0, 8200.0, 60000.0):
        moved = []
        for make in (AdamW, torch.optim.AdamW):
            param = Parameter(torch.ones(3, dtype=torch.float16))
            optimizer = make([param], lr=0.125, weight_decay=0.0)
            for _ in range(3):
                param.grad = torch.full_like(param, size)
                optimizer.step()
            moved.append(1 - param.detach())
        ours, theirs = moved
        assert ours.isfinite().all()
        # Ours takes a step before it rounds the average, torch's afterwards.
        assert (ours - theirs).abs().max() <= 0.126


def _huge(param: Tensor, kind: str, step: int) -> Tensor:
    """A gradient of up to the dtype's largest number, of either sign."""
    generator = torch.Generator().manual_seed(step)
    noise = torch.rand(param.shape, generator=generator, dtype=torch.float64)
    part = {
        "constant": torch.ones_like(noise),
        "noise": 2 * noise - 1,
        "spikes": torch.where(noise < 0.3, (-1.0) ** step, 1e-4 * noise),
        "signs": (noise - 0.5).sign(),
    }[kind]
    return (part * torch.finfo(param.dtype).max).to(param.dtype)


def _stays_finite(case: Case, dtype: torch.dtype, **options: Any) -> None:
    for kind in ("constant", "noise", "spikes", "signs"):
        params = [*case.params(dtype), *case.params(dtype)]
        optimizer = case.make(params, lr=1e-3, **options)
        for step in range(3):
            for param in params:
                param.grad = _huge(param, kind, step)
            optimizer.step()
            assert all(param.isfinite().all() for param in params), (kind, step)
        entries = [each for state in optimizer.state.values() for each in state.values()]
        assert not any(each.isnan().any() for each in entries), kind


def _overflows(case: Case) -> bool:
    """torch's SGD sums gradients, and the original of QUAD squares the first."""
    return (case.name == "sgd" and "momentum" in case.options) or "literal" in case.options


@for_each(("case", "dtype"), spread([case for case in CASES if not _overflows(case)], DTYPES))
def test_parameters_stay_finite(case: Case, dtype: torch.dtype):
    _stays_finite(case, dtype)


def test_so_they_do_in_chunks_and_in_compiled_code(monkeypatch: pytest.MonkeyPatch):
    """One rule will do: compiled code, chunks and batches have the same bits for each."""
    if compiler_available("cpu"):
        _stays_finite(Case("adamw"), torch.float32, compile=True)
    monkeypatch.setattr("steepest.engine.chunks.SMALL", 1)
    monkeypatch.setattr("steepest.engine.chunks.chunk_length", lambda *_, **__: 4)
    _stays_finite(Case("adamw"), torch.float32)


def test_the_root_of_infinity_is_infinite_and_of_nan_nan():
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([torch.inf, torch.nan, 0.0, largest, 4.0])
    root = exact_sqrt(x.clone())
    assert root[0] == torch.inf
    assert root[1].isnan()
    assert 0 < root[2] < 1.2e-19
    torch.testing.assert_close(root[3:].double(), x[3:].double().sqrt())


def test_hyperball_holds_norms_whose_squares_overflow():
    ends = []
    for size in (1.0, 2.0**70):
        param = Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * size)
        optimizer = Hyperball([param], lr=0.25)
        for step in range(3):
            param.grad = gradient(torch.zeros_like(param), 0, step)
            optimizer.step()
        ends.append(param.detach() / size)
    assert torch.equal(*ends)
