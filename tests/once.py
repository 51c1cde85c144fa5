"""Work that takes seconds and that several files need: one of pytest-xdist's workers does it for all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = ["filled_once"]


def filled_once(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], object]) -> Path:
    """Return a folder that ``fill`` has been called with."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = factory.mktemp(name)
        fill(folder)
        return folder
    folder = factory.getbasetemp().parent / name
    filled, failed = (folder.with_name(f"{name} is {what}") for what in ("filled", "failed"))
    try:
        folder.mkdir()
    except FileExistsError:
        for _ in range(2400):
            if filled.exists():
                return folder
            assert not failed.exists(), f"another worker's tests say what is wrong with {name!r}"
            time.sleep(0.1)
        raise TimeoutError(f"the worker that fills {name!r} has not finished") from None
    try:
        fill(folder)
    except BaseException:
        failed.touch()
        raise
    filled.touch()
    return folder
