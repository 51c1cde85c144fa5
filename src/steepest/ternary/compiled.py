"""Passes over ternary weights compiled: a graph for all sizes, and the same function eagerly without one."""

from __future__ import annotations

import threading
import types
import warnings
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from steepest.compile.global_settings import surroundings
from steepest.compile.inductor import inductor
from steepest.engine.compiled import compiler_available, warn_no_compiler

__all__ = ["run_compiled", "wants_compiling"]

# Compiling takes 4 to 10 seconds on a new machine, 1 to 2 from torch's cache. Of 2**22 weights a step saves
# 8 ms by it (votes by sign) to 20 ms (by magnitude): they are earned back in some 80 to 1200 steps.
_PAYS_FROM = 1 << 22

Result = TypeVar("Result")

_graphs: dict[Hashable, Callable[..., Any]] = {}
_broken: set[Hashable] = set()
_compiling = threading.RLock()


def wants_compiling(option: bool | None, weights: int, device: torch.device) -> bool:
    """Whether passes over so many weights are compiled.

    Args:
        option: the user's. None: where it pays and there is a compiler. True, without one: a warning.
        weights: of all layers together, since they share the graphs.
        device: where they are.
    """
    if option is False or (option is None and weights < _PAYS_FROM):
        return False
    available = compiler_available(device.type)
    if option and not available:
        warn_no_compiler(device.type)
    return available


@torch.no_grad()
def run_compiled(
    key: Hashable,
    function: Callable[..., Result],
    arguments: tuple[Any, ...],
    trial: Callable[[], tuple[Any, ...]] | None = None,
) -> Result:
    """``function(*arguments)`` by its graph; eagerly, with a warning once, where it cannot be compiled.

    Args:
        key: what the function is, sizes and torch's global settings apart.
        function: writes into its arguments only.
        arguments: tensors of any size, and numbers.
        trial: makes arguments of sizes that stand for all, with which the graph is made.
    """
    key = (key, surroundings())
    if key not in _broken:
        try:
            # Threads that step alike would each compile for seconds.
            with _compiling:
                if key not in _graphs:
                    graph = _compile(function)
                    if trial is not None:
                        graph(*trial())
                    _graphs[key] = graph
            result: Result = _graphs[key](*arguments)
            return result
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # No cache folder, a compiler that does not work: found before anything is written.
            _broken.add(key)
            why = (str(error).strip() or repr(error)).splitlines()[0]
            warnings.warn(
                f"steepest moves ternary weights without compilation: {why}", RuntimeWarning, stacklevel=3
            )
    return function(*arguments)


def _compile(function: Callable[..., Result]) -> Callable[..., Result]:
    # A code object of its own: torch.compile counts recompilations by it.
    fresh = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(fresh, fullgraph=True, dynamic=True, backend=inductor)
