from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from steepest.lab.bench.case import ours
from steepest.lab.bench.params import SharedParams
from steepest.lab.bench.products import Product, total_flops
from steepest.lab.bench.profiling import capture_graph, profile_step, try_capture
from steepest.lab.bench.shapes import tiny
from steepest.linalg.product import _onednn_linear, product

CPU = torch.device("cpu")


def test_temporary_bytes_are_the_peak_and_not_the_sum() -> None:
    def one_at_a_time() -> None:
        for _ in range(5):
            torch.ones(1 << 16)

    def at_once() -> None:
        held = [torch.ones(1 << 16) for _ in range(5)]
        del held

    one = 4 << 16
    assert one <= profile_step(one_at_a_time, CPU).temporary_bytes < 1.1 * one
    assert 5 * one <= profile_step(at_once, CPU).temporary_bytes < 5.1 * one


def test_freeing_older_memory_is_not_credited() -> None:
    old = [torch.ones(1 << 16)]

    def step() -> None:
        old.clear()
        torch.ones(1 << 14)

    assert profile_step(step, CPU).temporary_bytes <= 4 << 14


@pytest.mark.parametrize("rule", ["muon", "procrustes", "quad"])
def test_products_have_the_flops_that_torch_counts(rule: str) -> None:
    shared = SharedParams.create(tiny().hidden(1), CPU, torch.float32)
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


def test_a_step_is_warmed_up_on_a_side_stream_before_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Stream:
        def __init__(self, name: object = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            events.append(f"{self.name} waits")

    class Graph:
        def replay(self) -> None:
            events.append("replay")

    @contextmanager
    def context(thing: object) -> Iterator[None]:
        events.append(f"into {type(thing).__name__}")
        try:
            yield
        finally:
            events.append("out")

    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", context)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", context)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("synchronized"))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: events.append(f"waits: {mode}"))
    replay = capture_graph(lambda: events.append("step"), cuda)
    warmup = ["into Stream", "side waits", "into Stream", "waits: error", "step", "waits: 0", "out"]
    captured = [*warmup, "main waits", "into Graph", "step", "out", "out"]
    assert events == captured
    replay()
    assert events == [*captured, "replay"]
    events.clear()
    assert try_capture(lambda: events.append("step"), cuda) == "yes"
    assert events == [*captured, "replay", "synchronized"]
    events.clear()
    assert try_capture(lambda: 1 // 0, cuda) == "no: ZeroDivisionError: integer division or modulo by zero"
    # A host sync raises during the warm-up, and the debug mode is restored afterwards.
    assert events == [*warmup[:4], "waits: 0", "out", "out"]


def test_compiled_code_is_detected() -> None:
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    x = torch.ones(3)
    compiled(x)
    assert profile_step(lambda: compiled(x), CPU).compiled
    assert not profile_step(lambda: x + 1, CPU).compiled


@pytest.mark.parametrize("transposed", [False, True])
def test_products_by_onednn_are_found_and_reproduced(transposed: bool) -> None:
    x, y = torch.ones(300, 200), torch.ones(100, 200).mT if transposed else torch.ones(200, 100)
    seen = profile_step(lambda: product(x, y), CPU, products=True).products
    by_onednn = _onednn_linear() is not None
    expected = Product(1, 300, 200, 100, torch.float32, (False, transposed), onednn=by_onednn)
    assert seen == {expected: 1}
    assert total_flops(seen) == 2 * 300 * 200 * 100
    assert profile_step(expected.runner(CPU), CPU, products=True).products == seen
