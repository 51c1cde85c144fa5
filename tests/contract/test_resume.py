"""Save, new process, load, go on = never stopped, bit for bit: every rule, dtype and way of saving."""

from __future__ import annotations

from typing import Any

import pytest

from processes import run_processes
from steepest.engine import pipeline, reductions

from .resume_jobs import WAYS, result
from .training import identical, steps


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results by way of saving, those of the run that never stopped under "straight"."""
    folder = tmp_path_factory.mktemp("resume")
    trained = {job: job.make() for job in {job: None for _, _, jobs in WAYS.values() for job in jobs}}
    # Eager here, whatever a job says: only the new process compiles.
    monkeypatch = pytest.MonkeyPatch()
    for module in (pipeline, reductions):
        monkeypatch.setattr(module, "wants_compiling", lambda *arguments: False)
    for job, (net, optimizer) in trained.items():
        steps(optimizer, list(net.parameters()), range(job.before))
    for way, (save, _, jobs) in WAYS.items():
        save(folder / way, {job: trained[job] for job in jobs})
    for job, made in trained.items():
        if job.before == 0:
            made = trained[job] = job.make()  # of which no state dict was ever asked
        job.go_on(*made)
    monkeypatch.undo()
    straight = {str(job): result(*made) for job, made in trained.items()}
    (resumed,) = run_processes("contract.resume_jobs", 1, folder)
    return {"straight": straight, **resumed}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_the_run_that_never_stopped(way: str, runs: dict[str, Any]):
    """One test a way, because a process that runs any of them makes all of the checkpoints."""
    resumed, straight = runs[way], runs["straight"]
    assert "error" not in resumed, resumed["error"]
    assert list(resumed) == [str(job) for job in WAYS[way][2]]
    differing = [
        f"{what} of {job}"
        for job, found in resumed.items()
        for what in ("params", "optimizer")
        if not identical(found[what], straight[job][what])
    ]
    assert not differing
