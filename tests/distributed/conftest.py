"""Real processes, started once: starting takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

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
    found = run_processes("gloo_job", WORLD, folder)
    finished.touch()
    return found


def saved(folder: Path, world: int) -> list[dict[str, Any]]:
    """Return what each process has saved in the folder."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


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
    return saved(folder, world)
