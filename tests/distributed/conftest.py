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
    return run_processes("gloo_job", WORLD, folder)


def run_processes(job: str, world: int, folder: Path) -> list[dict[str, Any]]:
    """Run a module of this package in several processes; return what each has saved in the folder."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", f"tests.distributed.{job}"]
    path = os.pathsep.join([str(root), *sys.path])
    jobs = [
        subprocess.Popen(
            [*command, *map(str, (rank, world, folder))], cwd=root, env={**os.environ, "PYTHONPATH": path}
        )
        for rank in range(world)
    ]
    try:
        assert [each.wait(timeout=240) for each in jobs] == [0] * world
    finally:
        for each in jobs:
            each.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
