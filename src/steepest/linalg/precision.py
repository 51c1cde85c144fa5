"""Set torch's float32 matmul precision for a block of code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch

__all__ = ["MatmulPrecision", "float32_matmul_precision"]

MatmulPrecision = Literal["highest", "high", "medium"]

# torch adds attributes to these modules at import time, so type checkers do not see them.
_BACKENDS: Any = torch.backends


@contextlib.contextmanager
def float32_matmul_precision(precision: str) -> Iterator[None]:
    """Set torch's float32 matmul precision inside the block, and restore the caller's settings on exit.

    torch has two interfaces for this setting, ``torch.set_float32_matmul_precision`` and one attribute per
    backend (``torch.backends.cuda.matmul.fp32_precision`` and others). Both are restored, whichever one the
    caller used; a backend that inherited its precision inherits it again.

    >>> before = torch.get_float32_matmul_precision()
    >>> with float32_matmul_precision("medium"):
    ...     torch.get_float32_matmul_precision()
    'medium'
    >>> torch.get_float32_matmul_precision() == before
    True
    """
    products = (_BACKENDS.cuda.matmul, _BACKENDS.mkldnn.matmul)
    # A backend says that it inherits the overall precision only while that is "none".
    overall, _BACKENDS.fp32_precision = _BACKENDS.fp32_precision, "none"
    own = [each.fp32_precision for each in products]
    _BACKENDS.fp32_precision = overall
    # With both backends at "ieee", get_float32_matmul_precision returns its stored value instead of raising.
    for each in products:
        each.fp32_precision = "ieee"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for each, value in zip(products, own, strict=True):
            each.fp32_precision = value
