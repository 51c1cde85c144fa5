from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from steepest.lab.bench.entry import ours
from steepest.lab.bench.material import Material
from steepest.lab.bench.observe import capture, captured, observe
from steepest.lab.bench.products import Product, flops_of
from steepest.lab.bench.shapes import tiny
from steepest.linalg.product import _onednn_linear, product

CPU = torch.device("cpu")


def test_the_peak_is_what_is_alive_at_once_and_not_the_sum() -> None:
    def in_turns() -> None:
        for _ in range(5):
            torch.ones(1 << 16)

    def at_once() -> None:
        held = [torch.ones(1 << 16) for _ in range(5)]
        del held

    one = 4 << 16
    assert one <= observe(in_turns, CPU).temporary_bytes < 1.1 * one
    assert 5 * one <= observe(at_once, CPU).temporary_bytes < 5.1 * one


def test_what_is_freed_that_was_there_before_is_no_credit() -> None:
    old = [torch.ones(1 << 16)]

    def act() -> None:
        old.clear()
        torch.ones(1 << 14)

    assert observe(act, CPU).temporary_bytes <= 4 << 14


@pytest.mark.parametrize("rule", ["muon", "procrustes", "quad"])
def test_products_have_the_flops_that_torch_counts(rule: str) -> None:
    material = Material.of(tiny().hidden(1), CPU, torch.float32)
    optimizer = ours(rule, "eager").make(material.params)
    material.lend_gradients()
    optimizer.step()
    seen = observe(optimizer.step, CPU, products=True)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert flops_of(seen.products) == counter.get_total_flops() > 0


@pytest.mark.parametrize(
    "product",
    [
        Product(1, 3, 4, 5, torch.float32),
        Product(2, 3, 4, 5, torch.float32, (True, False)),
        Product(1, 3, 4, 5, torch.bfloat16, (False, True)),
        Product(3, 3, 4, 5, torch.float64, (True, True)),
    ],
)
def test_a_rehearsal_computes_the_product_that_it_is_named_after(product: Product) -> None:
    assert observe(product.rehearse(CPU), CPU, products=True).products == {product: 1}
    assert product.flops == 2 * product.batch * 3 * 4 * 5


def test_a_step_is_warmed_on_a_stream_of_its_own_before_it_is_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []

    class Stream:
        def __init__(self, name: object = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            said.append(f"{self.name} waits")

    class Graph:
        def replay(self) -> None:
            said.append("replay")

    @contextmanager
    def within(thing: object) -> Iterator[None]:
        said.append(f"into {type(thing).__name__}")
        try:
            yield
        finally:
            said.append("out")

    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", within)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append("synchronized"))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: said.append(f"waits: {mode}"))
    replay = captured(lambda: said.append("step"), cuda)
    tried = ["into Stream", "side waits", "into Stream", "waits: error", "step", "waits: 0", "out"]
    warmed = [*tried, "main waits", "into Graph", "step", "out", "out"]
    assert said == warmed
    replay()
    assert said == [*warmed, "replay"]
    said.clear()
    assert capture(lambda: said.append("step"), cuda) == "yes"
    assert said == [*warmed, "replay", "synchronized"]
    said.clear()
    assert capture(lambda: 1 // 0, cuda) == "no: ZeroDivisionError: integer division or modulo by zero"
    # What waits for the device is refused before a capture begins, and nothing else is afterwards.
    assert said == [*tried[:4], "waits: 0", "out", "out"]


def test_an_eager_step_is_not_compiled_and_a_compiled_function_is() -> None:
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    x = torch.ones(3)
    compiled(x)
    assert observe(lambda: compiled(x), CPU).compiled
    assert not observe(lambda: x + 1, CPU).compiled


@pytest.mark.parametrize("turned", [False, True])
def test_products_by_onednn_are_seen_and_rehearsed(turned: bool) -> None:
    x, y = torch.ones(300, 200), torch.ones(100, 200).mT if turned else torch.ones(200, 100)
    seen = observe(lambda: product(x, y), CPU, products=True).products
    by_onednn = _onednn_linear() is not None
    expected = Product(1, 300, 200, 100, torch.float32, (False, turned), onednn=by_onednn)
    assert seen == {expected: 1}
    assert flops_of(seen) == 2 * 300 * 200 * 100
    assert observe(expected.rehearse(CPU), CPU, products=True).products == seen
