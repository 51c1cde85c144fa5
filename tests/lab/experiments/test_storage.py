"""What workers of one experiment may do to each other in the middle of beginning a trial."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from steepest.lab.experiments import storage
from steepest.lab.experiments.storage import Storage
from steepest.lab.records import Range

from ..conftest import make_record


@pytest.mark.parametrize(("older", "runs"), [(0.1, False), (0.2, True)])
def test_a_trial_waits_for_the_values_of_an_older_one(older: float, runs: bool, tmp_path: Path) -> None:
    ours, theirs = Storage(tmp_path, "shared"), Storage(tmp_path, "shared")
    first = theirs.study("lion", "search").ask()
    ran: list[dict[str, float]] = []

    def objective(values: dict[str, float]) -> tuple[float, Any]:
        ran.append(values)
        return 1.0, make_record("lion")

    with ThreadPoolExecutor() as pool:
        second = pool.submit(ours.run, "lion", "search", objective, values={"lr": 0.1})
        with pytest.raises(TimeoutError):
            second.result(1.0)
        first.suggest_float("lr", older, older)
        assert second.result(60) == runs
    assert ran == [{"lr": 0.1}] * runs


def test_a_result_that_comes_after_the_worker_was_taken_for_dead_does_not_count(tmp_path: Path) -> None:
    ours, theirs = Storage(tmp_path, "shared"), Storage(tmp_path, "shared")

    def slow(values: dict[str, float]) -> tuple[float, Any]:
        (trial,) = theirs.study("lion", "search").get_trials()
        theirs._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return 1.0, make_record("lion", 1.0)

    assert not ours.run("lion", "search", slow, values={"lr": 0.1})
    assert ours.finished("lion", "search") == []
    assert ours.run("lion", "search", lambda values: (1.0, make_record("lion", 2.0)), values={"lr": 0.1})
    assert [record.validated("loss") for record in ours.finished("lion", "search")] == [2.0]


def test_the_objectives_own_error_is_not_blamed_on_the_storage(tmp_path: Path) -> None:
    class Own(KeyError):
        pass

    def fails(values: dict[str, float]) -> tuple[float, Any]:
        raise Own from ZeroDivisionError()

    with pytest.raises(Own) as error:
        Storage(tmp_path, "shared").run("lion", "search", fails, values={"lr": 0.1})
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_worker_that_died_before_its_first_heartbeat_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = Storage(tmp_path, "shared")
    shared.study("lion", "search").ask()
    assert shared.running("lion", "search") == [{}]
    monkeypatch.setattr(storage, "GRACE_SECONDS", 0)
    shared.refresh()
    assert shared.running("lion", "search") == []
    assert shared.run("lion", "search", lambda values: (1.0, make_record("lion")), values={"lr": 0.1})
    assert [record.optimizer for record in shared.finished("lion", "search")] == ["lion"]


def test_a_lock_that_is_held_for_long_stays_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(storage, "GRACE_SECONDS", 2)
    ours, theirs = Storage(tmp_path, "shared"), Storage(tmp_path, "shared")
    said: list[str] = []

    def wait() -> None:
        with theirs.lock():
            said.append("theirs")

    with ThreadPoolExecutor() as pool:
        with ours.lock():
            waiting = pool.submit(wait)
            time.sleep(4)  # twice the grace
            said.append("ours")
        waiting.result(60)
    assert said == ["ours", "theirs"]


def test_sqlite_writes_ahead_from_the_first_connection_on(tmp_path: Path) -> None:
    with Storage(tmp_path, "shared")._storage.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1


def test_a_defect_of_ours_is_not_blamed_on_the_storage(tmp_path: Path) -> None:
    class Broken(BaseSampler):
        def sample_relative(self, *arguments: Any) -> dict[str, Any]:
            raise AttributeError("a defect")

        infer_relative_search_space = sample_independent = sample_relative

    with pytest.raises(AttributeError, match="a defect"):
        Storage(tmp_path, "shared").run(
            "lion",
            "search",
            lambda values: (1.0, make_record("lion")),
            values={},
            ranges={"lr": Range(low=0.1, high=1)},
            sampler=Broken(),
        )
