"""Functions compiled once for tensors of any size, with a fall back to running them eagerly."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from steepest.compile.cache import compiled_once, give_up
from steepest.compile.inductor import inductor

__all__ = ["run_dynamic", "trial_matrix", "trial_planes"]

T = TypeVar("T")

# All different, so that Dynamo takes no two sizes for one symbol, and large enough for Inductor to generate
# multi-threaded loops.
_ROWS, _COLUMNS = 264, 520


@torch.no_grad()
def run_dynamic(
    key: Hashable,
    function: Callable[..., T],
    arguments: tuple[Any, ...],
    doing: str,
    trial: Callable[[], tuple[Any, ...]] | None = None,
) -> T:
    """Call ``function(*arguments)`` compiled, or eagerly, with one warning, where it cannot be compiled.

    Args:
        key: identifies the function and the options that it closes over. Sizes are not part of it.
        function: writes to its arguments only. A failed compilation leaves them unchanged.
        arguments: tensors of any size, and numbers.
        doing: what steepest does, for the warning, see :func:`steepest.compile.cache.compiled_once`.
        trial: makes arguments to compile with, see :func:`trial_matrix`. Without it the first call's
            arguments are used.
    """

    def build() -> Callable[..., T]:
        compiled = _compile(function)
        if trial is not None:
            compiled(*trial())
        return compiled

    compiled = compiled_once(key, build, doing)
    if compiled is not None:
        try:
            return compiled(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Dynamo compiles within a call, before it runs anything.
            give_up(key, error, doing)
    return function(*arguments)


def trial_matrix(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a matrix of zeros to compile with, so that Dynamo treats both of its sizes as dynamic."""
    return _any_size(torch.zeros(_ROWS, _COLUMNS, dtype=dtype, device=device))


def trial_planes(planes: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Make the slices of a tensor [rows, planes, columns] of zeros along its second dimension, likewise."""
    made = torch.zeros(_ROWS, planes, _COLUMNS, dtype=dtype, device=device)
    return [_any_size(plane) for plane in made.unbind(1)]


def _any_size(tensor: Tensor) -> Tensor:
    for dim in range(tensor.dim()):
        torch._dynamo.mark_dynamic(tensor, dim)
    return tensor


def _compile(function: Callable[..., T]) -> Callable[..., T]:
    # Dynamo counts recompilations per code object, so each function gets one of its own.
    fresh = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(fresh, fullgraph=True, dynamic=True, backend=inductor)
