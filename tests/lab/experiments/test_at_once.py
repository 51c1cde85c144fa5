"""Two commands started on one directory at once: one experiment, and each trial once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from torch import Tensor

from steepest.lab import LabError, Task, race
from steepest.lab.experiments import run
from steepest.lab.experiments.run import join
from steepest.lab.experiments.storage import Storage
from steepest.lab.progress import Callback
from steepest.lab.records import Experiment, read_records

from ..conftest import make_experiment
from .test_resume import run_sweep
from .test_workers import Worker, assert_each_once, short_waits

__all__ = ["short_waits"]


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Worker]]:
    both = [Worker(), Worker()]
    yield both
    for worker in both:
        worker.kill()


def test_two_races_started_at_once_are_one(workers: list[Worker], tmp_path: Path) -> None:
    for attempt in range(3):
        out = tmp_path / str(attempt)
        for at, worker in enumerate(workers):
            # Each finds room for another number of trials within its budget.
            worker.begin(out, "", plan=3 + at)
        begun = [trial for worker in workers for trial in iter(worker.said, "done")]
        records = read_records(out)
        assert Counter(record.key for record in records).most_common(1)[0][1] == 1
        trials = Experiment.load(out).trials
        assert trials in (3, 4)
        assert Counter(r.phase for r in records) == {"search": trials, "tuned": 4, "default": 4}
        assert_each_once(begun, records)


def test_the_plan_that_comes_second_takes_the_firsts(
    plane: Task[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Another(Callback):
        def message(self, text: str) -> None:
            if "fit the budget" in text:
                run_race(8)

    def run_race(trials: int, **options: Any) -> Experiment:
        monkeypatch.setattr(
            "steepest.lab.experiments.race.fit_budget", lambda *arguments: (trials, ["signgsd"])
        )
        return race(
            plane,
            ["signgsd", "sgd"],
            budget=1,
            seeds=1,
            steps=3,
            out=tmp_path,
            timing_seconds=1e-3,
            **options,
        ).experiment

    # The other race runs while this one has planned, but not yet begun.
    second = run_race(5, callback=Another())
    assert (second.trials, [*second.optimizers], [*second.not_run]) == (8, ["signgsd"], ["sgd"])
    assert second == Experiment.load(tmp_path)
    assert Counter(r.phase for r in read_records(tmp_path)) == {"search": 8, "tuned": 1, "default": 1}


def test_optimizers_that_join_at_once_are_all_there(tmp_path: Path) -> None:
    names = ["adamw", "lion", "muon", "simba", "sgd", "quad"]

    def come(name: str) -> None:
        wanted = make_experiment([name], baseline=None, name="shared")
        join(tmp_path, lambda saved: wanted, Storage(tmp_path, "shared"))

    Storage(tmp_path, "shared")
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(come, names))
    assert {*Experiment.load(tmp_path).optimizers} == {*names}


def test_a_database_is_created_by_several_at_once(tmp_path: Path) -> None:
    for attempt in range(4):
        (tmp_path / str(attempt)).mkdir()
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda _, at=attempt: Storage(tmp_path / str(at), "shared"), range(6)))


def test_the_lock_keeps_others_out(tmp_path: Path) -> None:
    ours, theirs = Storage(tmp_path, "shared"), Storage(tmp_path, "shared")
    inside = Event()

    def enter() -> None:
        with theirs.lock():
            inside.set()

    with ThreadPoolExecutor() as pool:
        with ours.lock():
            entered = pool.submit(enter)
            assert not inside.wait(0.5)
        entered.result(60)


def test_fresh_waits_for_no_one_and_spares_a_running_experiment(plane: Task[Tensor], tmp_path: Path) -> None:
    class Impatient(Callback):
        def on_trial_start(self, trial: Any) -> None:
            with pytest.raises(LabError, match=f"another process is working on {tmp_path.name}: stop it"):
                run_sweep(plane, tmp_path, fresh=True)

    before = run_sweep(plane, tmp_path, callback=Impatient())
    assert len(before.records) == 4
    assert len(run_sweep(plane, tmp_path, fresh=True).records) == 4


def test_an_experiment_deleted_under_a_running_one_ends_it_with_one_line(
    plane: Task[Tensor], tmp_path: Path
) -> None:
    class Deletes(Callback):
        def on_trial_end(self, record: Any) -> None:
            Storage(tmp_path, tmp_path.name).clear()

    with pytest.raises(LabError, match="--fresh") as error:
        run_sweep(plane, tmp_path, callback=Deletes())
    assert "\n" not in str(error.value)


def test_a_worker_does_not_go_on_in_the_experiment_that_replaced_its_own(
    plane: Task[Tensor], tmp_path: Path
) -> None:
    class Replaces(Callback):
        def on_trial_end(self, record: Any) -> None:
            other = Storage(tmp_path, tmp_path.name)
            if (saved := other.load_experiment()) is not None and saved.created != "later":
                other.clear()
                other.save_experiment(saved.model_copy(update={"created": "later", "steps": 99}))

    with pytest.raises(LabError, match=r"meanwhile.*--fresh"):
        run_sweep(plane, tmp_path, callback=Replaces())
    other = Storage(tmp_path, tmp_path.name)
    assert not any(other.tried(name, "search") for name in ("adamw", "lion"))


def test_fresh_spares_records_of_others_in_a_shared_storage(plane: Task[Tensor], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    run_sweep(plane, tmp_path / "a" / "same", storage=url)
    mine = tmp_path / "b" / "same" / "records.jsonl"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(LabError, match=r"there is no experiment\.json"):
        run_sweep(plane, mine.parent, storage=url, fresh=True)
    assert mine.read_text() == "mine"


def test_workers_that_give_up_different_optimizers_forget_neither(
    plane: Task[Tensor], tmp_path: Path
) -> None:
    shared = Storage(tmp_path, "shared")
    wanted = make_experiment(["adamw", "lion", "sgd"], baseline=None, name="shared")
    runners = [
        run.Runner(
            tmp_path,
            join(tmp_path, lambda saved: wanted, shared),
            plane,
            dict.fromkeys(wanted.optimizers),  # type: ignore[arg-type]
            shared,
            None,  # type: ignore[arg-type]
            Callback(),
        )
        for _ in range(2)
    ]
    for runner, label in zip(runners, ("lion", "sgd"), strict=True):
        runner._give_up(label)
    assert [*runners[1].specs] == [*Experiment.load(tmp_path).optimizers] == ["adamw"]
