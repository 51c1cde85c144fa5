"""Real processes, started once: starting takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from once import filled_once
from processes import run_processes, saved

from .gloo_job import WORLD


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two gloo processes have left the results of every job of ``gloo_job``, and checkpoints."""
    return filled_once(tmp_path_factory, "gloo", lambda at: run_processes("distributed.gloo_job", WORLD, at))


@pytest.fixture(scope="session")
def processes(folder: Path) -> list[dict[str, Any]]:
    """What each of the processes got out of every job."""
    return saved(folder, WORLD)
