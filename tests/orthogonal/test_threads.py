"""Matrix optimizers in several threads of one process, which has one float32 matmul precision."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steepest
from steepest.linalg import float32_matmul_precision


@pytest.fixture(autouse=True)
def high() -> Iterator[None]:
    """The user's own setting, which must be there at the end."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def _run(*works: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"
    if errors:
        raise errors[0]


def _watching(precision: str, seen: list[str], within: Callable[[], object]) -> Callable[[], None]:
    """Steps of a Muon that records the precision before and after something else happens."""

    class Watching(steepest.Muon):
        def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs: object) -> Tensor:
            seen.append(torch.get_float32_matmul_precision())
            within()
            seen.append(torch.get_float32_matmul_precision())
            return super().orthogonalize(p, grad, **kwargs)

    param = Parameter(torch.ones(4, 4))
    optimizer = Watching([param], fp32_matmul_prec=precision)

    def work() -> None:
        for _ in range(20):
            param.grad = torch.ones(4, 4)
            optimizer.step()

    return work


def test_each_thread_computes_in_its_own_precision():
    seen: dict[str, list[str]] = {"highest": [], "medium": []}
    _run(*[_watching(name, own, lambda: time.sleep(0.001)) for name, own in seen.items()])
    assert {name: set(own) for name, own in seen.items()} == {"highest": {"highest"}, "medium": {"medium"}}


def test_threads_of_one_precision_may_wait_for_each_other():
    """As ranks do that are threads."""
    meet = threading.Barrier(2, timeout=30)
    seen: list[str] = []
    _run(*[_watching("medium", seen, meet.wait) for _ in range(2)])
    assert set(seen) == {"medium"}


def test_blocks_within_blocks():
    def work() -> None:
        for _ in range(20):
            with float32_matmul_precision("medium"):
                time.sleep(0.0005)
                with float32_matmul_precision("highest"):
                    assert torch.get_float32_matmul_precision() == "highest"
                    time.sleep(0.0005)
                assert torch.get_float32_matmul_precision() == "medium"

    _run(work, work, work)


def test_a_thread_that_needs_another_precision_gets_its_turn():
    """Beside four that are never all outside of their blocks, if they do not let it in."""
    waiting, entered = threading.Event(), threading.Event()
    blocks = [0] * 4

    def work(at: int) -> None:
        while not entered.is_set() and blocks[at] < 100:
            with float32_matmul_precision("medium"):
                time.sleep(0.004 + 0.001 * at)
            blocks[at] += waiting.is_set()

    def other() -> None:
        time.sleep(0.02)
        waiting.set()
        with float32_matmul_precision("highest"):
            entered.set()

    _run(*[lambda at=at: work(at) for at in range(4)], other)
    assert max(blocks) < 100, "it came in when they were done"
