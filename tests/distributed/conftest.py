"""Real processes, started once: starting takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .gloo_job import WORLD


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes leave their results and checkpoints."""
    return tmp_path_factory.mktemp("gloo")


@pytest.fixture(scope="session")
def processes(folder: Path) -> list[dict[str, Any]]:
    """What each of two gloo processes got out of every job of ``gloo_job``."""
    root = Path(__file__).parents[2]
    jobs = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "tests.distributed.gloo_job",
                *map(str, (rank, WORLD, folder)),
            ],
            cwd=root,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
        )
        for rank in range(WORLD)
    ]
    try:
        assert [job.wait(timeout=240) for job in jobs] == [0] * WORLD
    finally:
        for job in jobs:
            job.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
