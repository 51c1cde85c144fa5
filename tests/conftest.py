"""Shared by all tests: the devices there are, and compilations that take no longer than they must."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

from steepest import optimizer, rule
from steepest.compile import cache
from steepest.engine import compiled

# What a test computes must not depend on what this machine's last timings said; subprocesses inherit it.
os.environ["STEEPEST_AUTOTUNE"] = "off"
# torch.compile believes what the processor says of its vectors: to try them takes seconds in every process.
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"

# A graph repeats its code for each of its rows, up to four, and takes as much longer to compile.
# Two will do: `all_rows` gives a test as many as users have.
ROWS: Any = compiled.GraphSpec.rows
compiled.GraphSpec.rows = property(lambda spec: min(2, ROWS.fget(spec)))  # type: ignore[assignment, misc]

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device of this machine, one after the other."""
    return torch.device(request.param)


@pytest.fixture
def all_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs have as many rows as outside the tests, and are compiled anew."""
    monkeypatch.setattr(compiled.GraphSpec, "rows", ROWS)
    monkeypatch.setattr(cache, "_made", {})
    compiled._filling.cache_clear()
    yield
    compiled._filling.cache_clear()


@pytest.fixture
def forgotten_rules() -> Iterator[None]:
    """Rules that the test defines are unknown again after it."""
    rule.find_rule("ternary_flip")  # which imports ours: they must be known again
    tables: list[dict[str, Any]] = [optimizer.OPTIMIZERS, rule._RULES]
    before = [dict(table) for table in tables]
    yield
    for table, known in zip(tables, before, strict=True):
        table.clear()
        table.update(known)


def pytest_runtest_setup() -> None:
    """Keep a table of Inductor's that torch 2.13 makes anew for every operation of a graph.

    The table is always the same, and making it takes a third of the time of a compilation. Inductor is not
    imported for it: a process that never compiles should not wait for that.
    """
    module = sys.modules.get("torch._inductor.dtype_propagation")
    table = getattr(module, "DtypePropagationOpsHandler", None)
    if table is None or getattr(table, "_instance", None) is None or "_kept" in vars(table):
        return
    # The singleton exists and is complete; __new__ returns it, and only __init__ would run again.
    table._kept = True
    table.__init__ = lambda self: None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """The garbage collector need not look at thousands of tests again and again, now or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` need CUDA."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
