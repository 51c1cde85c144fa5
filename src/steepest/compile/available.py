"""The decision to compile: the user's choice, the compilers at hand, and the size from which it pays."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import warnings

import torch

__all__ = ["PAYS_FROM", "compiler_available", "wants_compiling", "warn_no_compiler"]

# Compiling takes 2 to 10 seconds on a new machine, 1 to 2 with torch's cache filled. At 2**22 elements a step
# saves 6 ms (Lion) to 14 ms (AdamW; 2 threads, 16 tensors), or 8 to 20 ms for ternary weights, and so earns
# the seconds back within 80 to 1200 steps. At 2**20 it saves 1 to 3 ms.
PAYS_FROM = 1 << 22
"""The number of elements in a batch from which ``compile=None`` compiles."""


@functools.cache
def compiler_available(device_type: str) -> bool:
    """Check whether torch.compile can generate code for this device here: a C++ compiler, or Triton."""
    if device_type == "cpu":
        return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "cl") if name)
    return device_type in ("cuda", "xpu") and importlib.util.find_spec("triton") is not None


@functools.cache
def warn_no_compiler(device_type: str) -> None:
    """Warn, once per device type, that ``compile=True`` has no effect for lack of a compiler."""
    warnings.warn(
        f"compile=True, but there is no compiler for {device_type!r} here; running eagerly",
        RuntimeWarning,
        stacklevel=4,
    )


def wants_compiling(option: bool | None, elements: int, device: torch.device) -> bool:
    """Decide whether to compile a pass over tensors, and warn if the user asked for it in vain.

    Args:
        option: the user's ``compile``. True: always. False: never. None: from :data:`PAYS_FROM` elements on,
            silently not where there is no compiler.
        elements: of all tensors that share the compiled code, together.
        device: where the tensors are.
    """
    if option is False or (option is None and elements < PAYS_FROM) or device.type == "meta":
        return False
    available = compiler_available(device.type)
    if option and not available:
        warn_no_compiler(device.type)
    return available
