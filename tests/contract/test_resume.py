"""Save, new process, load, go on = never stopped: every rule x dtype x way of saving, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .resume_jobs import AFTER, BEFORE, JOBS, WAYS, Job, go_on, result
from .training import identical


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results by way of saving, those of the run that never stopped under "straight"."""
    folder = tmp_path_factory.mktemp("resume")
    trained = {str(job): job.make() for job in JOBS}
    go_on(trained.values(), BEFORE)
    for save, _ in WAYS.values():
        save(folder, trained)
    go_on(trained.values(), AFTER)
    straight = {name: result(*made) for name, made in trained.items()}
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-m", "contract.resume_jobs", str(folder)]
    subprocess.run(command, cwd=tests, check=True, timeout=240)
    return {"straight": straight, **torch.load(folder / "results.pt", weights_only=True)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("job", JOBS, ids=str)
def test_a_resumed_run_is_the_run_that_never_stopped(job: Job, way: str, runs: dict[str, Any]):
    resumed, straight = runs[way], runs["straight"][str(job)]
    assert "error" not in resumed, resumed["error"]
    assert identical(resumed[str(job)]["params"], straight["params"])
    assert identical(resumed[str(job)]["optimizer"], straight["optimizer"])
