"""Set torch's float32 matmul precision for a block of code."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

__all__ = ["MatmulPrecision", "float32_matmul_precision"]

MatmulPrecision = Literal["highest", "high", "medium"]

# torch adds attributes to these modules at import time, so type checkers do not see them.
_BACKENDS: Any = torch.backends
# How long a block lets those of another precision go first, should its threads wait for each other.
_COURTESY_SECONDS = 30.0


class _Shared:
    """The setting that threads in a block share: it is the process's, and torch has none for a thread."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.precision = ""
        self.holders = self.waiting = 0
        self.restore: Callable[[], None] = lambda: None

    def enter(self, precision: str) -> None:
        """Wait until no thread needs another precision, and set this one."""
        with self.changed:
            if self.waiting and self.precision == precision:
                # Threads that step without pause would keep them out. A holder may wait for this one, though.
                self.changed.wait_for(lambda: not self.waiting, _COURTESY_SECONDS)
            self.waiting += 1
            try:
                self.changed.wait_for(lambda: not self.holders or self.precision == precision)
            finally:
                self.waiting -= 1
            if not self.holders:
                self.restore = _set(precision)
                self.precision = precision
                self.changed.notify_all()
            self.holders += 1

    def leave(self) -> None:
        """Restore the caller's settings unless another thread still needs this one."""
        with self.changed:
            self.holders -= 1
            if not self.holders:
                self.restore()
                self.changed.notify_all()


_shared = _Shared()
# The precision of the block that each thread is in.
_own = threading.local()


@contextlib.contextmanager
def float32_matmul_precision(precision: str) -> Iterator[None]:
    """Set torch's float32 matmul precision inside the block, and restore the caller's settings on exit.

    torch has two interfaces for this setting, ``torch.set_float32_matmul_precision`` and one attribute per
    backend (``torch.backends.cuda.matmul.fp32_precision`` and others). Both are restored, whichever one the
    caller used; a backend that inherited its precision inherits it again.

    The setting is the whole process's. Threads in such blocks share one precision, and a block with another
    waits until they have left theirs, so that no thread computes in another's precision. Code outside of such
    blocks sees the setting of those that run.

    >>> before = torch.get_float32_matmul_precision()
    >>> with float32_matmul_precision("medium"):
    ...     torch.get_float32_matmul_precision()
    'medium'
    >>> torch.get_float32_matmul_precision() == before
    True
    """
    outer: str | None = getattr(_own, "precision", None)
    # Two threads that waited for each other to leave their outer blocks would wait for ever.
    if outer is not None:
        _shared.leave()
    try:
        _shared.enter(precision)
        try:
            _own.precision = precision
            yield
        finally:
            _shared.leave()
    finally:
        _own.precision = outer
        if outer is not None:
            _shared.enter(outer)


def _set(precision: str) -> Callable[[], None]:
    """Set the precision, and return what restores the present settings."""
    products = (_BACKENDS.cuda.matmul, _BACKENDS.mkldnn.matmul)
    # A backend says that it inherits the overall precision only while that is "none".
    overall, _BACKENDS.fp32_precision = _BACKENDS.fp32_precision, "none"
    own = [each.fp32_precision for each in products]
    _BACKENDS.fp32_precision = overall
    # With both backends at "ieee", get_float32_matmul_precision returns its stored value instead of raising.
    for each in products:
        each.fp32_precision = "ieee"
    before = torch.get_float32_matmul_precision()

    def restore() -> None:
        torch.set_float32_matmul_precision(before)
        for each, value in zip(products, own, strict=True):
            each.fp32_precision = value

    torch.set_float32_matmul_precision(precision)
    return restore
