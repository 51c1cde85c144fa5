"""Compiled code that is called directly, without Dynamo and its guards.

For a call over four small rows Dynamo takes 20 µs on top of the code's own 5: wrapper and frame evaluation
take 13, the bytecode that unpacks the arguments 4, the guards 2 to 3. In a step over 150 tensors that is
0.8 ms, in which memory is idle; ``torch.compiler.set_stance(skip_guard_eval_unsafe=True)`` skips the guards
alone and saves a tenth of it. Callers must have verified dtype, device and layout themselves.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from steepest.compile.cache import NotCompiled
from steepest.compile.inductor import inductor

__all__ = ["Code", "compiled_code"]

# Called with the size of each row, the tensors of all rows concatenated, and the other arguments.
Code = Callable[[Sequence[int], Sequence[Tensor], Sequence[Tensor | None]], Any]


def compiled_code(
    function: Callable[..., None],
    rows: Sequence[Sequence[Tensor]],
    others: Sequence[Tensor | None],
    *,
    fused: bool = False,
) -> Code:
    """Compile ``function(rows, *others)``, run it on these tensors, and return the code without its guards.

    The code accepts rows of any size, and checks nothing. The caller guarantees flat tensors of the same
    dtypes and device as these, and of one size within a row.

    Args:
        function: writes to the tensors of its rows, and returns nothing.
        rows: flat tensors to compile with. Each row has a size of its own, so that Dynamo does not take two
            sizes for one symbol.
        others: tensors of fixed shapes, or None.
        fused: see :func:`~steepest.compile.inductor.inductor`.

    Raises:
        NotCompiled: compilation is switched off. Errors of torch.compile itself propagate.
    """
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        code = inductor(graph, examples, fused=fused)

        def watched(*given: Any) -> Any:
            calls.append((code, given))
            return code(*given)

        return watched

    def traced(rows: Sequence[Sequence[Tensor]], *others: Tensor | None) -> None:
        # Fail fast when compilation is disabled; otherwise every step would retry. And Dynamo, when it skips
        # this function, may still compile functions that it calls.
        if not torch.compiler.is_compiling():
            raise NotCompiled("torch.compile is switched off")
        function(rows, *others)

    for tensor in itertools.chain.from_iterable(rows):
        torch._dynamo.mark_dynamic(tensor, 0)
    # Dynamo caches code, and limits recompilations, per code object. A new code object for each compilation
    # keeps optimizers from exhausting one another's limit.
    fresh = types.FunctionType(
        traced.__code__.replace(), traced.__globals__, function.__name__, None, traced.__closure__
    )
    # dynamic=False, because Dynamo also remembers functions by their line in the source: whatever differs
    # from the last function compiled there would become dynamic.
    torch.compile(fresh, fullgraph=True, dynamic=False, backend=backend)(rows, *others)
    if not calls:
        raise NotCompiled("torch.compile has another backend for now")
    ((code, given),) = calls
    # Dynamo keeps a reference to the backend, whose closure must not keep megabytes of tensors alive.
    calls.clear()
    # Dynamo chooses which inputs the code takes and in which order. The recorded call shows it: sizes are
    # recognized by their values, tensors by their addresses.
    at = {row[0].shape[0]: place for place, row in enumerate(rows)}
    tensors = [*itertools.chain.from_iterable(rows), *others]
    begins = {t.data_ptr(): len(rows) + n for n, t in enumerate(tensors) if t is not None and t.numel()}
    places = [at[x] if isinstance(x, int) else begins[x.data_ptr()] for x in given]
    pick = itemgetter(*places)
    return lambda sizes, rows, others: code(*pick((*sizes, *rows, *others)))
