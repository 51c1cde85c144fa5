"""Claims of trials, workers that die, and whose errors are whose."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import TrialState

from steepest.lab import LabError
from steepest.lab.experiments import storage
from steepest.lab.experiments.storage import Storage
from steepest.lab.records import Range

from ..conftest import make_record


def run(shared: Storage, objective: Callable[[], tuple[float, Any]]) -> None:
    with shared.lock():
        trial = shared.claim("lion", "search", {"lr": 0.1})
    shared.run(trial, objective)


def test_a_result_that_comes_after_the_worker_was_taken_for_dead_does_not_count(tmp_path: Path) -> None:
    ours, theirs = Storage(tmp_path, "shared"), Storage(tmp_path, "shared")

    def slow() -> tuple[float, Any]:
        (trial,) = theirs.study("lion", "search").get_trials()
        theirs._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return 1.0, make_record("lion", 1.0)

    run(ours, slow)
    assert ours.finished("lion", "search") == []
    run(ours, lambda: (1.0, make_record("lion", 2.0)))
    assert [record.validated("loss") for record in ours.finished("lion", "search")] == [2.0]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_the_objectives_own_error_is_not_blamed_on_the_storage_and_ends_the_trial(
    error: type[BaseException], tmp_path: Path
) -> None:
    shared = Storage(tmp_path, "shared")

    def fails() -> tuple[float, Any]:
        raise error from ZeroDivisionError()

    with pytest.raises(error) as raised:
        run(shared, fails)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert [trial.state for trial in shared.study("lion", "search").get_trials()] == [TrialState.FAIL]


def test_a_worker_that_died_as_it_claimed_a_trial_is_given_up(tmp_path: Path) -> None:
    shared = Storage(tmp_path, "shared")
    shared.study("lion", "search").ask()
    with shared.lock():
        assert shared.running("lion", "search") == []
    run(shared, lambda: (1.0, make_record("lion")))
    assert [record.optimizer for record in shared.finished("lion", "search")] == ["lion"]


def test_a_claimed_trial_runs_until_its_worker_gives_no_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "GRACE_SECONDS", 1)
    ours, theirs = Storage(tmp_path, "shared"), Storage(tmp_path, "shared")
    with ours.lock():
        ours.claim("lion", "search", {"lr": 0.1})
    with theirs.lock():
        assert theirs.running("lion", "search") == [{"lr": 0.1}]
    time.sleep(2.5)  # databases count whole seconds
    with theirs.lock():
        assert theirs.running("lion", "search") == []


def test_a_claim_may_take_longer_than_the_grace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "GRACE_SECONDS", 1)
    ours, theirs = Storage(tmp_path, "shared"), Storage(tmp_path, "shared")

    class Slow(RandomSampler):
        def sample_independent(self, *arguments: Any) -> Any:
            time.sleep(2.5)  # databases count whole seconds
            return super().sample_independent(*arguments)

    with ours.lock():
        claimed = ours.claim("lion", "search", {}, {"lr": Range(low=0.1, high=1)}, [Slow()])
    with theirs.lock():
        assert theirs.running("lion", "search") == [claimed.params]


def test_a_sampler_that_repeats_itself_gives_way_to_the_next(tmp_path: Path) -> None:
    shared = Storage(tmp_path, "shared")
    ranges = {"lr": Range(low=0.1, high=1)}
    with shared.lock():
        first, second = (
            shared.claim("lion", "search", {}, ranges, [RandomSampler(0), RandomSampler(1)]) for _ in range(2)
        )
    assert first.params != second.params
    states = [trial.state for trial in shared.study("lion", "search").get_trials()]
    assert states == [TrialState.RUNNING, TrialState.FAIL, TrialState.RUNNING]


@pytest.mark.parametrize("url", ["mysql://user@host/name", "sqlite://", "sqlite:///:memory:"])
def test_a_database_that_cannot_be_locked_or_shared_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(LabError, match=f"must be an SQLite file or in PostgreSQL, not {url}"):
        Storage(tmp_path, "shared", url)


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
        Storage(tmp_path, "shared").claim("lion", "search", {}, {"lr": Range(low=0.1, high=1)}, [Broken()])
