"""Compiled code that is called without torch.compile's guards.

They look at every tensor of every call, for 5 µs a row: half a millisecond in a step over 150 tensors,
during which memory is idle. Who calls here has looked at all that the code was made for.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from steepest.compile.inductor import inductor

__all__ = ["Code", "NotCompiled", "compiled_code"]

# (sizes of the rows, the rows one after the other, the other arguments)
Code = Callable[[Sequence[int], Sequence[Tensor], Sequence[Tensor | None]], Any]


class NotCompiled(RuntimeError):
    """torch.compile has run a function as it is: somebody has switched it off, perhaps for a while."""


def compiled_code(
    function: Callable[..., None], rows: Sequence[Sequence[Tensor]], others: Sequence[Tensor | None]
) -> Code:
    """Compile ``function(rows, *others)``, run it on these tensors, and give what torch.compile made of it.

    The code takes rows of any sizes. That tensors are flat, have the dtypes and the device of these, and a
    row's one size is for the caller to know: nobody looks.

    Args:
        function: writes into its rows, and returns nothing.
        rows: flat tensors, each row's of a size of its own, so that none is taken for another.
        others: tensors of fixed shapes, or None.

    Raises:
        NotCompiled: nothing was compiled. What torch.compile itself raises comes through.
    """
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        code = inductor(graph, examples)

        def watched(*given: Any) -> Any:
            calls.append((code, given))
            return code(*given)

        return watched

    def traced(rows: Sequence[Sequence[Tensor]], *others: Tensor | None) -> None:
        # Not for nothing in every step while it is switched off; and what it calls might be compiled then.
        if not torch.compiler.is_compiling():
            raise NotCompiled("torch.compile is switched off")
        function(rows, *others)

    for tensor in itertools.chain.from_iterable(rows):
        torch._dynamo.mark_dynamic(tensor, 0)
    # torch.compile caches, and limits recompilation, per code object: one of its own for each graph
    # keeps optimizers from exhausting one another's limit.
    fresh = types.FunctionType(
        traced.__code__.replace(), traced.__globals__, function.__name__, None, traced.__closure__
    )
    # It remembers functions by their place in the source, and would take for dynamic whatever has changed
    # there since the last one.
    torch.compile(fresh, fullgraph=True, dynamic=False, backend=backend)(rows, *others)
    if not calls:
        raise NotCompiled("torch.compile has another backend for now")
    ((code, given),) = calls
    # torch keeps the backend, which must not keep the tensors: megabytes for each graph.
    calls.clear()
    # torch.compile chooses which inputs its code takes, and their order; what it took here tells.
    at = {row[0].numel(): place for place, row in enumerate(rows)}
    tensors = [*itertools.chain.from_iterable(rows), *others]
    begins = {t.data_ptr(): len(rows) + n for n, t in enumerate(tensors) if t is not None and t.numel()}
    places = [at[x] if isinstance(x, int) else begins[x.data_ptr()] for x in given]
    pick = itemgetter(*places)
    return lambda sizes, rows, others: code(*pick((*sizes, *rows, *others)))
