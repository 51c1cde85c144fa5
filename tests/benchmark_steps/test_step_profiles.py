"""The matrix products and the compiled code that a profile finds in a step."""

from __future__ import annotations

import pytest
import torch
from benchmarks.steps.case import ours
from benchmarks.steps.params import SharedParams
from benchmarks.steps.products import Product, total_flops
from benchmarks.steps.profiling import profile_step
from torch.utils.flop_counter import FlopCounterMode

from steepest.model_shapes import model_shapes

CPU = torch.device("cpu")


@pytest.mark.parametrize("rule", ["muon", "quad"])
def test_products_have_the_flops_that_torch_counts(rule: str) -> None:
    shared = SharedParams.create(model_shapes("tiny").hidden(1), CPU, torch.float32)
    optimizer = ours(rule, "eager").make(shared.params)
    shared.set_grads()
    optimizer.step()
    profiled = profile_step(optimizer.step, CPU, products=True)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert total_flops(profiled.products) == counter.get_total_flops() > 0


@pytest.mark.parametrize(
    "product",
    [
        Product(1, 3, 4, 5, torch.float32),
        Product(2, 3, 4, 5, torch.float32, (True, False)),
        Product(1, 3, 4, 5, torch.bfloat16, (False, True)),
        Product(3, 3, 4, 5, torch.float64, (True, True)),
    ],
)
def test_a_products_runner_computes_this_product(product: Product) -> None:
    assert profile_step(product.runner(CPU), CPU, products=True).products == {product: 1}
    assert product.flops == 2 * product.batch * 3 * 4 * 5


def test_compiled_code_is_detected() -> None:
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    x = torch.ones(3)
    compiled(x)
    assert profile_step(lambda: compiled(x), CPU).compiled
    assert not profile_step(lambda: x + 1, CPU).compiled
