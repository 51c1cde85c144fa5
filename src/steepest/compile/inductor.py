"""The backend for torch.compile: Inductor with this library's options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.compile import sign

__all__ = ["inductor"]

# The code must accept tensors of any size, so Inductor must not assert sizes.
_OPTIONS = {"size_asserts": False}
# From 30 operations or 4 reads on, Inductor writes an intermediate result to memory, as large as a tensor.
# These limits keep a step with master weights in one loop; far higher ones compile for a minute.
_FUSED = {"realize_opcount_threshold": 200, "realize_reads_threshold": 16}
# Inductor knows the processor's vector instructions, but test-compiles each of them as well, which takes
# 5 of the 10 seconds of a first compilation. Assume that the C++ compiler supports them.
_TRUST_VECTORS = {"cpp.vec_isa_ok": True}


def inductor(
    graph: torch.fx.GraphModule, examples: Sequence[Tensor], *, fused: bool = False
) -> Callable[..., Any]:
    """Compile a graph with Inductor; ``fused`` keeps all that is long in one loop, which compiles longer."""
    # Importing Inductor takes seconds, which only users who compile should pay for.
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table
    from torch.compiler import config as caches

    table = sign.with_sign(select_decomp_table())

    def compiled(options: dict[str, Any]) -> Callable[..., Any]:
        options = {**_OPTIONS, **(_FUSED if fused else {}), **options}
        # AOTAutograd's cache does not ask with which decompositions its graphs were made.
        named = {"cache_key_tag": caches.cache_key_tag + sign.name()}
        with caches.patch(named):  # type: ignore[attr-defined]
            code: Any = compile_fx(graph, [*examples], config_patches=options, decompositions=table)
        made: Callable[..., Any] = code
        return made

    if config.cpp.vec_isa_ok is None:
        try:
            return compiled(_TRUST_VECTORS)
        except Exception:
            # The C++ compiler may be older than the processor. Inductor has cached the instructions that it
            # was told to assume; clear them, so that the second attempt tests each one.
            from torch._inductor.cpu_vec_isa import valid_vec_isa_list

            valid_vec_isa_list.cache_clear()
    return compiled({})
