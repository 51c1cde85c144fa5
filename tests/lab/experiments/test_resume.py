"""Experiments that stop and go on, grow, or meet another one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest.lab import Experiment, LabError, Record, Result, Task, race, sweep
from steepest.lab.experiments.storage import Storage
from steepest.lab.progress import Callback
from steepest.lab.records import read_records
from steepest.lab.training import machine
from steepest.lab.training.schedule import Schedule

from ..conftest import make_record


def run_sweep(task: Task[Any], out: Path, optimizers: Any = "lion", **options: Any) -> Result:
    options = {"space": {"lr": [0.01, 0.1]}, "seeds": 1, "steps": 6, "timing_seconds": 0, **options}
    return sweep(task, optimizers, options.pop("space"), out=out, **options)


def outcome(records: list[Record]) -> list[Record]:
    """The records without what the clock gave."""
    return [
        r.model_copy(
            update={
                "seconds": 0.0,
                "machine": {},  # with the git revision, which a commit changes
                "training_loss": [(step, 0.0, loss) for step, _, loss in r.training_loss],
                "validation": [e.model_copy(update={"seconds": 0.0}) for e in r.validation],
            }
        )
        for r in records
    ]


class StopAfter(Callback):
    """Interrupts the experiment in the middle of the trial after the given number of trials."""

    def __init__(self, trials: int) -> None:
        self.left = trials

    def on_trial_end(self, record: Record) -> None:
        self.left -= 1

    def on_step(self, step: int, loss: float) -> None:
        if self.left == 0 and step > 5:
            raise KeyboardInterrupt


def fails(*arguments: Any) -> Any:
    raise AssertionError


def test_a_resumed_search_equals_an_uninterrupted_one(plane: Task[Tensor], tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "space": {"lr": (1e-3, 1.0)},
        "trials": 5,  # the Gaussian process chooses the last one
        "name": "the same",
    }
    whole = run_sweep(plane, tmp_path / "whole", **options)
    for trials in (0, 2, 2):
        with pytest.raises(KeyboardInterrupt):
            run_sweep(plane, tmp_path / "torn", callback=StopAfter(trials), **options)
        assert (tmp_path / "torn" / "records.jsonl").exists()
    resumed = run_sweep(plane, tmp_path / "torn", **options)
    assert outcome(resumed.records) == outcome(whole.records)
    assert len(whole.records) == 5 + 1 + 1
    assert read_records(tmp_path / "torn") == resumed.records


def test_a_finished_experiment_trains_no_more(plane: Task[Tensor], tmp_path: Path) -> None:
    first = run_sweep(plane, tmp_path)
    again = run_sweep(replace(plane, loss=fails), tmp_path)
    assert again.records == first.records
    assert again.experiment == first.experiment == Experiment.load(tmp_path)


def test_optimizers_and_seeds_join_a_finished_experiment(plane: Task[Tensor], tmp_path: Path) -> None:
    space = {"lr": [0.003, 0.1]}
    first = run_sweep(plane, tmp_path, ["adamw"], space=space, steps=20)
    second = run_sweep(plane, tmp_path, ["lion"], space=space, steps=20, baseline="adamw")
    third = run_sweep(plane, tmp_path, ["adamw", "lion"], space=space, steps=20, seeds=2)
    assert list(third.experiment.optimizers) == ["adamw", "lion"]
    assert third.experiment.seeds == [1, 2]
    assert third.experiment.baseline == "adamw"

    def runs(records: list[Record]) -> list[tuple[str, str, int]]:
        return [(r.optimizer, r.phase, r.seed) for r in records]

    for before, after, added in (
        (first, second, {("lion", "search", 0), ("lion", "tuned", 1), ("lion", "default", 1)}),
        (second, third, {(label, phase, 2) for label in ("adamw", "lion") for phase in ("tuned", "default")}),
    ):
        assert [r for r in after.records if r in before.records] == before.records
        new = runs([r for r in after.records if r not in before.records])
        assert {run for run in new if run[1] != "decayed"} == added
        assert len(after.records) == len(before.records) + len(new)
    decayed = [r for r in third.records if r.phase == "decayed"]
    assert [r.seed for r in decayed] == [1, 2]
    # The second seed moves the mean curves, but not the target of trials that are to be compared.
    assert len({r.steps for r in decayed}) == 1


def test_what_joins_later_adds_its_command_and_says_that_it_was_timed_apart(
    plane: Task[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(command: str, *optimizers: str) -> Experiment:
        monkeypatch.setattr("steepest.lab.training.machine.command", lambda: command)
        return run_sweep(plane, tmp_path, optimizers, timing_seconds=1e-3).experiment

    assert call("first", "adamw").notes == []
    # Timed again beside the new one, so all took turns.
    together = call("second", "adamw", "lion")
    assert together.notes == []
    assert together.command == "first; second"
    apart = call("third", "signgsd")
    assert len(apart.notes) == 1
    assert apart.notes[0].startswith("The steps of signgsd were timed apart from those of adamw, lion")
    assert apart.command == "first; second; third"
    assert call("fourth", "adamw") == apart
    assert Experiment.load(tmp_path) == apart


def test_an_experiment_that_grows_meanwhile_keeps_its_records(plane: Task[Tensor], tmp_path: Path) -> None:
    class Another(Callback):
        def on_trial_start(self, trial: Any) -> None:
            if trial.phase == "default":
                other = Storage(tmp_path, tmp_path.name)
                saved = other.load_experiment()
                assert saved is not None
                entries = {**saved.optimizers, "signgsd": saved.optimizers["lion"]}
                other.save_experiment(saved.model_copy(update={"optimizers": entries}))
                record = make_record("signgsd", metric=plane.metric)
                other.run(other.claim("signgsd", "search", {"lr": 0.1}), lambda: (1.0, record))

    result = run_sweep(plane, tmp_path, "lion", callback=Another())
    assert {r.optimizer for r in result.records} == {"lion", "signgsd"}
    assert read_records(tmp_path) == result.records


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 7}, "steps is 6 there and 7 here"),
        ({"space": {"lr": [0.01, 0.2]}}, r"lion's range of lr is \[0.01, 0.1\] there and \[0.01, 0.2\] here"),
        ({"settings": ["lion.weight_decay=0.5"]}, "lion's weight_decay is 0.0 there and 0.5 here"),
        ({"schedule": Schedule("linear")}, "schedule is .*cosine.* there and .*linear.* here"),
        ({"space": {"lr": [0.1]}}, "trials is 2 there and 1 here"),
        ({"baseline": "lion"}, "baseline is None there and lion here"),
        ({"baseline": "muon"}, "the baseline 'muon' is not among the optimizers lion"),
        ({"config": {"data": "other"}}, r"config is \{\} there and \{'data': 'other'\} here"),
    ],
)
def test_another_experiment_is_refused_and_nothing_changes(
    change: dict[str, Any], words: str, plane: Task[Tensor], finished: Path
) -> None:
    before = {path.name: path.read_bytes() for path in finished.glob("*.json*")}
    task = replace(plane, config=change.get("config", {}))
    options = {name: value for name, value in change.items() if name != "config"}
    with pytest.raises(LabError, match=words) as error:
        run_sweep(task, finished, **options)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in finished.glob("*.json*")} == before


@pytest.fixture(scope="module")
def finished(plane: Task[Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished")
    run_sweep(plane, path)
    return path


@pytest.mark.parametrize("space", [{"lr": [0.01, 0.1]}, {"lr": (1e-3, 1.0)}])
def test_a_copy_without_its_database_goes_on_as_the_original(
    space: Any, plane: Task[Tensor], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"space": space, "trials": 5, "timing_seconds": 1e-3}
    with pytest.raises(KeyboardInterrupt):
        run_sweep(plane, tmp_path / "first", callback=StopAfter(2), **options)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("experiment.json", "records.jsonl"):
        (copy / name).write_bytes((tmp_path / "first" / name).read_bytes())
    kept = read_records(copy)
    whole = run_sweep(plane, tmp_path / "first", **options)
    resumed = run_sweep(plane, copy, **options)
    assert len(kept) == 2
    assert resumed.records[: len(kept)] == kept
    same = {"experiment": ""}
    assert [r.model_copy(update=same) for r in outcome(resumed.records)] == [
        r.model_copy(update=same) for r in outcome(whole.records)
    ]


def test_the_files_of_a_running_experiment_have_its_finished_trials(
    plane: Task[Tensor], tmp_path: Path
) -> None:
    seen = []

    class Count(Callback):
        def on_trial_end(self, record: Record) -> None:
            seen.append(len(read_records(tmp_path)))

    run_sweep(plane, tmp_path, callback=Count())
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_fresh_starts_over_in_any_storage_and_spares_other_files(
    elsewhere: bool, plane: Task[Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    storage = f"sqlite:///{tmp_path}/elsewhere.db" if elsewhere else None
    options: dict[str, Any] = {"storage": storage, "space": {"lr": [0.1]}}
    run_sweep(plane, out, **options)
    neighbour = run_sweep(plane, tmp_path / "run2", **options).records
    (out / "mine.txt").write_text("not a file of the experiment")
    fresh = run_sweep(plane, out, fresh=True, **{**options, "steps": 7})
    assert {r.steps for r in fresh.records} == {7}
    assert len(fresh.records) == 3
    assert (out / "mine.txt").exists()
    assert run_sweep(plane, tmp_path / "run2", **options).records == neighbour


def test_bad_requests_leave_nothing(plane: Task[Tensor], tmp_path: Path) -> None:
    out = tmp_path / "new"
    for change, words in (
        ({"steps": 0}, "steps and trials must be at least 1, got 0"),
        ({"space": {"beta": [0.1]}}, "lion has no beta: it has rule, lr, "),
        ({"space": {"lr": (1.0, 0.1)}}, "0 < low < high < ∞, got 1.0 to 0.1"),
        ({"space": {"lr": [0.1], "weight_decay": (0.1, 1)}}, "ranges for all .*, or lists for all"),
        ({"space": {"lr": []}}, "the grid of lr needs finite values"),
        ({"space": {"lr": [0.1, math.nan]}}, "the grid of lr needs finite values"),
        ({"space": {"lr": [0.1, -1.0]}}, r"lr must be a finite number ≥ 0 .* got -1\.0"),
        ({"space": {"lr": (0.1, math.inf)}}, "the range of lr must satisfy 0 < low < high < ∞"),
        ({"space": {"betas": [0.5, 0.6]}}, r"betas must be 2 numbers in \[0, 1\), got 0\.5"),
        ({"settings": ["loin.lr=1"]}, "bad setting 'loin.lr=1'"),
    ):
        with pytest.raises(LabError, match=words):
            run_sweep(plane, out, **change)
    with pytest.raises(LabError, match="no trainable parameters"):
        run_sweep(replace(plane, make=lambda seed: nn.Linear(4, 1).requires_grad_(False)), out)
    with pytest.raises(LabError, match="trials must be at least 1"):
        race(plane, "lion", trials=0, out=out)
    with pytest.raises(LabError, match="trials or a budget, not both"):
        race(plane, "lion", trials=2, budget="5m", out=out)
    assert not out.exists()


def test_a_config_that_json_cannot_hold_is_refused(plane: Task[Tensor], tmp_path: Path) -> None:
    task = replace(plane, config={"x": torch.ones(2)})
    with pytest.raises(LabError, match=r"config must be plain JSON values: .*Tensor"):
        run_sweep(task, tmp_path)


def test_a_storage_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("no database, " * 100)
    with pytest.raises(LabError, match="cannot open the storage sqlite"):
        Storage(tmp_path, "x")
    with pytest.raises(LabError, match="cannot open the storage nonsense"):
        Storage(tmp_path, "x", "nonsense")


def test_a_diverged_record_survives_the_database(plane: Task[Tensor], tmp_path: Path) -> None:
    sgd = [("sgd", torch.optim.SGD)]
    task = replace(plane, evaluations=1)
    records = run_sweep(task, tmp_path, sgd, space={"lr": [1e30]}).records
    (search,) = (r for r in records if r.phase == "search")
    assert not search.finished
    assert not math.isfinite(search.training_loss[-1][2])
    assert math.isnan(search.validated("squared error"))
    assert [r.model_dump_json() for r in read_records(tmp_path)] == [r.model_dump_json() for r in records]


def test_the_callers_generator_does_not_change(plane: Task[Tensor], tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run_sweep(plane, tmp_path, "simba", space={"lr": [0.1]})
    assert torch.equal(before, torch.get_rng_state())


def test_an_optimizer_that_runs_out_of_memory_is_shown_as_not_run(tmp_path, plane):
    class Hungry(torch.optim.SGD):
        def step(self, closure=None):
            raise torch.OutOfMemoryError("CUDA out of memory")

    result = sweep(
        plane, ["signgsd", Hungry], {"lr": [0.01, 0.1]}, seeds=1, steps=5, out=tmp_path, timing_seconds=0
    )
    saved = Experiment.load(tmp_path)
    assert saved.not_run == {"Hungry": "it ran out of memory"}
    assert list(saved.optimizers) == ["signgsd"]
    assert {record.optimizer for record in result.records} == {"signgsd"}
    assert len(result.records) == 4


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://ann:secret@host/db", "postgresql://ann:…@host/db"),
        ("postgresql://ann:se/cr:et@host/db", "postgresql://ann:…@host/db"),
        ("postgresql://host/db?user=ann&password=secret", "'postgresql://host/db?user=ann&password=…'"),
    ],
)
def test_the_command_on_the_page_has_no_password(url, shown, monkeypatch):
    monkeypatch.setattr("sys.argv", ["steepest", "race", "--storage", url])
    assert machine.command() == f"steepest race --storage {shown}"


def test_the_command_on_the_page_can_be_copied(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for given, shown in {
        "race me.py": "python 'race me.py' --trials 2",
        "scripts/race.py": "python scripts/race.py --trials 2",
        str(tmp_path / "scripts" / "race.py"): "python scripts/race.py --trials 2",
        "/elsewhere/race.py": "python race.py --trials 2",  # a page shows no path of this machine
    }.items():
        monkeypatch.setattr("sys.argv", [given, "--trials", "2"])
        assert machine.command() == shown


def test_a_command_that_adds_nothing_new_is_named_once(tmp_path, plane, monkeypatch):
    for seeds in (1, 2, 3):
        monkeypatch.setattr("sys.argv", ["race.py", "--again"])
        sweep(plane, ["signgsd"], {"lr": [0.01, 0.1]}, seeds=seeds, steps=5, out=tmp_path, timing_seconds=0)
    assert Experiment.load(tmp_path).command == "python race.py --again"
