"""Where trials are kept: Optuna studies in a database that several workers can share.

Each optimizer has a study for every phase. A trial's record is an attribute of its Optuna trial, so the
database alone holds the whole experiment; `records.jsonl` is an export.
"""

from __future__ import annotations

import sqlite3
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic_core import PydanticSerializationError
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from ..errors import LabError
from ..records import EXPERIMENT_FILE, Experiment, Range, Record, read_records

HEARTBEAT_SECONDS = 5
GRACE_SECONDS = 20
"""A trial whose worker has given no sign of life for this long is run again."""

_WAIT_SECONDS = 0.1
_EXPERIMENT = "experiment"
_RECORD = "record"
# Values that the lab chooses itself may lie anywhere.
_ANY = FloatDistribution(-1e30, 1e30)

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class Storage:
    """The studies of one experiment, whose names begin with its name.

    They lie in `study.db` in the directory, or in another database, such as
    `postgresql+psycopg://user@host/database`.

    Raises:
        LabError: the database cannot be opened.
    """

    def __init__(self, directory: Path, name: str, url: str | None = None) -> None:
        self.name = name
        self.url = url or f"sqlite:///{(directory / 'study.db').resolve()}"
        try:
            try:
                self._storage = _open(self.url)
            except DBAPIError:
                time.sleep(1)  # another worker may have been creating the tables
                self._storage = _open(self.url)
        except (SQLAlchemyError, ImportError, sqlite3.Error) as error:
            raise LabError(f"cannot open the storage {self.url}: {error}") from error
        if self.url.startswith("sqlite"):
            # Two workers that write at once wait for each other instead of failing.
            event.listen(self._storage.engine, "connect", _write_ahead)
        self._studies: dict[tuple[str, str], optuna.Study] = {}
        self._trials: dict[tuple[str, str], list[FrozenTrial]] = {}
        self._records: dict[int, Record] = {}

    def clear(self) -> None:
        """Delete the experiment's studies."""
        for name in optuna.get_all_study_names(self._storage):
            if name.startswith(f"{self.name}/"):
                optuna.delete_study(study_name=name, storage=self._storage)
        self._studies.clear()
        self.refresh()

    def restore(self, directory: Path) -> None:
        """Take in the experiment of a directory whose database is another one, or was not copied with it."""
        if self.load_experiment() is not None or not (directory / EXPERIMENT_FILE).exists():
            return
        experiment = Experiment.load(directory).model_copy(update={"name": self.name})
        for record in read_records(directory):
            values: Mapping[str, float] = {"seed": float(record.seed)}
            space: Mapping[str, Any] = dict.fromkeys(values)
            if record.phase == "search":
                values, space = record.searched, experiment.optimizers[record.optimizer].space
            self.study(record.optimizer, record.phase).add_trial(
                create_trial(
                    value=record.score(experiment.metric),
                    params=dict(values),
                    distributions={**_distributions(space)},
                    user_attrs={_RECORD: record.model_dump(mode="json")},
                )
            )
        self.save_experiment(experiment)

    def refresh(self) -> None:
        """Forget what was read of the trials, so that the next call sees those of other workers."""
        self._trials.clear()

    def load_experiment(self) -> Experiment | None:
        """Return the experiment as it was last saved; None before that."""
        saved = self.study("", "experiment").user_attrs.get(_EXPERIMENT)
        return None if saved is None else Experiment.model_validate(saved)

    def save_experiment(self, experiment: Experiment) -> None:
        """Save the experiment for all workers."""
        try:
            saved = experiment.model_dump(mode="json")
        except PydanticSerializationError as error:
            raise LabError(f"the task's config must be plain JSON values: {error}") from error
        self.study("", "experiment").set_user_attr(_EXPERIMENT, saved)

    def study(self, optimizer: str, phase: str) -> optuna.Study:
        """Return an optimizer's study for a phase."""
        key = (optimizer, phase)
        if key not in self._studies:
            self._studies[key] = optuna.create_study(
                study_name=f"{self.name}/{optimizer}/{phase}", storage=self._storage, load_if_exists=True
            )
        return self._studies[key]

    def finished(self, optimizer: str, phase: str) -> list[Record]:
        """Return the records of the finished trials, oldest first, without duplicates."""
        found: dict[str, Record] = {}
        for trial in self._read(optimizer, phase, TrialState.COMPLETE):
            if trial._trial_id not in self._records:
                self._records[trial._trial_id] = Record.model_validate(trial.user_attrs[_RECORD])
            found.setdefault(str(sorted(trial.params.items())), self._records[trial._trial_id])
        return list(found.values())

    def running(self, optimizer: str, phase: str) -> list[dict[str, float]]:
        """Return the values of the trials that a live worker runs; trials of dead workers are given up."""
        if self._read(optimizer, phase, TrialState.RUNNING):
            self._give_up_stale(self.study(optimizer, phase))
            self._trials.pop((optimizer, phase))
        return [trial.params for trial in self._read(optimizer, phase, TrialState.RUNNING)]

    def _give_up_stale(self, study: optuna.Study) -> None:
        optuna.storages.fail_stale_trials(study)
        # Optuna looks for late heartbeats. A worker that dies as it begins a trial leaves none at all.
        oldest = datetime.now() - timedelta(seconds=GRACE_SECONDS)
        for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if not trial.params and trial.datetime_start is not None and trial.datetime_start < oldest:
                self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def run(
        self,
        optimizer: str,
        phase: str,
        objective: Callable[[dict[str, float]], tuple[float, Record]],
        *,
        values: Mapping[str, float],
        ranges: Mapping[str, Range] = {},
        sampler: BaseSampler | None = None,
    ) -> bool:
        """Run one trial and keep its record; return whether it was run.

        It is not, if the same trial was begun before: by another worker since the caller chose it, or because
        the sampler repeats itself. `objective` receives `values`, or if they are empty, those that `sampler`
        chooses within `ranges`; it returns the value to minimize, and the record.
        """
        study = self.study(optimizer, phase)
        # Not Optuna's queue of trials: another worker may take from it what this one has put there.
        study.sampler = PartialFixedSampler(dict(values), sampler or RandomSampler())
        spaces = _distributions(ranges or dict.fromkeys(values))
        ran = False

        def body(trial: optuna.Trial) -> float:
            nonlocal ran
            self._storage.record_heartbeat(trial._trial_id)
            chosen = {
                name: trial.suggest_float(name, space.low, space.high, log=space.log)
                for name, space in spaces.items()
            }
            if self._begun_before(study, trial):
                raise optuna.TrialPruned
            ran = True
            value, record = objective(chosen)
            trial.set_user_attr(_RECORD, record.model_dump(mode="json"))
            return value

        try:
            study.optimize(body, n_trials=1)
        finally:
            self.refresh()
        return ran

    def _begun_before(self, study: optuna.Study, trial: optuna.Trial) -> bool:
        """Return whether an older trial has the same values, once all older ones have theirs."""
        while True:
            begun = study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.COMPLETE))
            older = [each.params for each in begun if each.number < trial.number]
            if all(params.keys() == trial.params.keys() for params in older):
                return trial.params in older
            time.sleep(_WAIT_SECONDS)
            self._give_up_stale(study)

    def _read(self, optimizer: str, phase: str, state: TrialState) -> list[FrozenTrial]:
        key = (optimizer, phase)
        if key not in self._trials:
            self._trials[key] = self.study(optimizer, phase).get_trials(deepcopy=False)
        return [trial for trial in self._trials[key] if trial.state == state]


def _distributions(space: Mapping[str, Range | object]) -> dict[str, FloatDistribution]:
    return {
        name: FloatDistribution(each.low, each.high, log=True) if isinstance(each, Range) else _ANY
        for name, each in space.items()
    }


def _open(url: str) -> optuna.storages.RDBStorage:
    return optuna.storages.RDBStorage(
        url,
        engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None,
        heartbeat_interval=HEARTBEAT_SECONDS,
        grace_period=GRACE_SECONDS,
    )


def _write_ahead(connection: Any, record: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    # With a write-ahead log this survives a crash of the process, and saves most of the waiting for the disk.
    connection.execute("PRAGMA synchronous=NORMAL")
