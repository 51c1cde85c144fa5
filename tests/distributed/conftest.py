"""Real processes, started once: starting takes seconds."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from processes import run_processes, saved

from .gloo_job import WORLD


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes leave their results and checkpoints, for all workers of pytest-xdist."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return tmp_path_factory.mktemp("gloo")
    shared = tmp_path_factory.getbasetemp().parent / "gloo"
    shared.mkdir(exist_ok=True)
    return shared


@pytest.fixture(scope="session")
def processes(folder: Path) -> list[dict[str, Any]]:
    """What each of two gloo processes got out of every job of ``gloo_job``; one worker runs it for all."""
    finished = folder / "finished"
    try:
        (folder / "started").mkdir()
    except FileExistsError:
        for _ in range(2400):
            if finished.exists():
                return saved(folder, WORLD)
            time.sleep(0.1)
        raise TimeoutError("the worker that runs the processes has not finished") from None
    found = run_processes("distributed.gloo_job", WORLD, folder)
    finished.touch()
    return found
