"""torch.compile's own backend, with the options that all of this library's code is made by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["inductor"]

# Sizes are whatever they are. Which vector instructions the processor has is known; torch.compile also tries
# each of them on the C++ compiler, which takes longer than all the rest: 5 of 10 s.
_OPTIONS = {"size_asserts": False}
_UNTRIED = {**_OPTIONS, "cpp.vec_isa_ok": True}


def inductor(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
    """A graph's code."""
    # Seconds, which only those who compile should wait.
    from torch._inductor import compile, config

    code: Callable[..., Any]
    if config.cpp.vec_isa_ok is None:
        try:
            code = compile(graph, [*examples], options=_UNTRIED)
            return code
        except Exception:
            # A compiler older than the processor. What is taken to be there must be forgotten.
            from torch._inductor.cpu_vec_isa import valid_vec_isa_list

            valid_vec_isa_list.cache_clear()
    code = compile(graph, [*examples], options=_OPTIONS)
    return code
