"""The backend for torch.compile: Inductor with this library's options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["inductor"]

# The code must accept tensors of any size, so Inductor must not assert sizes.
_OPTIONS = {"size_asserts": False}
# Inductor knows the processor's vector instructions, but test-compiles each of them as well, which takes
# 5 of the 10 seconds of a first compilation. Assume that the C++ compiler supports them.
_TRUST_VECTORS = {**_OPTIONS, "cpp.vec_isa_ok": True}


def inductor(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
    """Compile a graph with Inductor."""
    # Importing Inductor takes seconds, which only users who compile should pay for.
    from torch._inductor import compile, config

    code: Callable[..., Any]
    if config.cpp.vec_isa_ok is None:
        try:
            code = compile(graph, [*examples], options=_TRUST_VECTORS)
            return code
        except Exception:
            # The C++ compiler may be older than the processor. Inductor has cached the instructions that it
            # was told to assume; clear them, so that the second attempt tests each one.
            from torch._inductor.cpu_vec_isa import valid_vec_isa_list

            valid_vec_isa_list.cache_clear()
    code = compile(graph, [*examples], options=_OPTIONS)
    return code
