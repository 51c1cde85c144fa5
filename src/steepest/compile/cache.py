"""The cache of compiled code: each piece is compiled once per process, and a failure is remembered."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from steepest.compile.global_settings import global_settings

__all__ = ["CapturedTooSoon", "NotCompiled", "compiled_once", "give_up"]

T = TypeVar("T")

# Unbounded: an entry takes seconds to make, so there are never many; and Inductor keeps loaded code anyway.
_made: dict[Hashable, Any] = {}
_broken: set[Hashable] = set()
# Reentrant, because building one function may trace code that asks for another.
_building = threading.RLock()


class NotCompiled(RuntimeError):
    """torch.compile ran a function eagerly, because the user has switched compilation off for now."""


class CapturedTooSoon(RuntimeError):
    """A CUDA graph is being captured, and code that the step needs has not been compiled yet."""


def compiled_once(key: Hashable, build: Callable[[], T], doing: str) -> T | None:
    """Return what ``build`` made for this key, calling it the first time; None where it cannot be compiled.

    Threads that ask for the same code at once wait for one compilation. A failure is final, with one warning,
    because failing takes seconds too. :class:`NotCompiled` is no failure: the next call tries again.

    Args:
        key: what the code is specialized on, except torch's global settings, which are added here.
        build: compiles, and runs the code once on tensors of its own so that failures show up here.
        doing: what steepest does, for the warning "steepest <doing> without compilation: …".

    Raises:
        torch.OutOfMemoryError, CapturedTooSoon: from ``build``; the next call tries again.
    """
    key = (key, global_settings())
    made: T | None = _made.get(key)
    if made is not None or key in _broken:
        return made
    with _building:
        # Another thread may have finished while this one waited.
        made = _made.get(key)
        if made is None and key not in _broken:
            try:
                made = _made[key] = build()
            except NotCompiled:
                return None
            except (torch.OutOfMemoryError, CapturedTooSoon):
                raise
            except Exception as error:
                # No cache folder, a broken compiler, a Python version that Dynamo cannot trace.
                _give_up(key, error, doing)
        return made


def give_up(key: Hashable, error: Exception, doing: str) -> None:
    """Drop code that failed when called: :func:`compiled_once` returns None for its key from now on."""
    _give_up((key, global_settings()), error, doing)


def _give_up(key: Hashable, error: Exception, doing: str) -> None:
    _made.pop(key, None)
    if key in _broken:
        return
    _broken.add(key)
    why = (str(error).strip() or repr(error)).splitlines()[0]
    warnings.warn(f"steepest {doing} without compilation: {why}", RuntimeWarning, stacklevel=4)
