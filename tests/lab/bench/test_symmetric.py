from __future__ import annotations

from typing import Any

import pytest
import torch

from steepest.lab.bench import bench
from steepest.lab.bench.sections import symmetric as module
from steepest.lab.bench.sections.symmetric import Stack, stacks
from steepest.lab.bench.shapes import model_shapes
from steepest.linalg import preferred_symmetric_kernel

CPU = torch.device("cpu")


def test_both_products_are_timed_for_every_shape_and_dtype() -> None:
    (result,) = bench(["tiny"], ["lion"], sections=["symmetric"], rounds=2).results
    products = {"X Xᵀ, [32×96]", "X Xᵀ, [32×32]", "X Xᵀ, [32×128]", "βR + αR², [32×32]"}
    expected = sorted((what, dtype) for what in products for dtype in ("bfloat16", "float32"))
    assert sorted((row["what"], row["dtype"]) for row in result.rows) == expected
    assert all(row["status"] == "ok" and row["rounds"] == 2 for row in result.rows)
    assert all(row["times_faster"] > 0 and row["reason"] == "" for row in result.rows)


def test_hidden_matrices_are_stacked_in_bounded_memory() -> None:
    found = stacks(model_shapes("gpt2-124m"), None)
    grams = {(s.count, s.rows, s.inner) for s in found if not s.squared and s.dtype == torch.float32}
    # 3.5, 9.5 and 2.4 float32 matrices of these shapes take a twelfth of 256 MiB.
    assert grams == {(3, 768, 2304), (9, 768, 768), (2, 768, 3072)}
    assert {s.inner for s in found if s.squared} == {768}
    assert len(found) == len(set(found)) == 2 * 6
    assert {s.count for s in stacks(model_shapes("gpt2-124m"), 1)} == {1}


@pytest.mark.parametrize("squared", [False, True])
def test_both_timers_compute_the_same_product(squared: bool) -> None:
    stack = Stack(2, 40, 40 if squared else 70, torch.float32, squared)
    full, symmetric = stack.timers(CPU)
    found: Any = full.run()
    assert found.shape == (2, 40, 40)
    assert torch.allclose(found, symmetric.run(), rtol=1e-5, atol=1e-5)
    assert stack.flops == 2 * 2 * 40 * 40 * stack.inner


def test_on_cuda_the_triton_kernel_is_preferred_while_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(
        module, "preferred_symmetric_kernel", lambda kernel=None: calls.append(kernel) or "default"
    )

    def interrupted() -> None:
        with module._symmetric_kernel(torch.device("cuda")) as how:
            assert "Triton kernel" in how
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert calls == [None, "triton", "default"]

    def missing(kernel: Any = None) -> str:
        if kernel == "triton":
            raise ModuleNotFoundError("triton")
        return "default"

    monkeypatch.setattr(module, "preferred_symmetric_kernel", missing)
    with module._symmetric_kernel(torch.device("cuda")) as how:
        assert "not installed" in how
    assert preferred_symmetric_kernel() == "default"


def test_a_failing_product_has_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*operands: object, **factors: object) -> Any:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(module, "mirrored_product", fail)
    (result,) = bench(["tiny"], ["lion"], sections=["symmetric"], rounds=1).results
    assert {row["reason"] for row in result.rows} == {"RuntimeError: out of shared memory"}
