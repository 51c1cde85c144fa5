"""Real processes, started once: starting takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORLD = 2


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo processes got out of every job of ``gloo_job``."""
    folder, root = tmp_path_factory.mktemp("gloo"), Path(__file__).parents[2]
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
