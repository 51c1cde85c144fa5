"""Where trials are kept: Optuna studies in a database that several workers can share.

Each optimizer has a study for every phase. A trial's record is an attribute of its Optuna trial, so the
database alone holds the whole experiment; `records.jsonl` is an export.
"""

from __future__ import annotations

import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import optuna
from optuna.distributions import FloatDistribution
from optuna.exceptions import OptunaError
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic_core import PydanticSerializationError
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from ..errors import LabError
from ..printable import printable
from ..records import RECORDS_FILE, Experiment, Phase, Range, Record

HEARTBEAT_SECONDS = 5
GRACE_SECONDS = 20
"""A trial whose worker has given no sign of life for this long is run again."""

_WAIT_SECONDS = 0.1
_CREATION_SECONDS = 1.0
_EXPERIMENT = "experiment"
_LOCK = "lock"
_RECORD = "record"
# What a database that is damaged, full, out of reach, or without its driver raises, through Optuna or not.
_DAMAGE = (SQLAlchemyError, sqlite3.Error, OptunaError, ImportError, ValueError, OSError)
# Values that the lab chooses itself may lie anywhere.
_ANY = FloatDistribution(-1e30, 1e30)

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", message="Heartbeat of storage")  # the lock's trials have none


class _ObjectiveError(Exception):
    """An error of the objective: no fault of the database."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class Storage:
    """The studies of one experiment, whose names begin with its name.

    They lie in `study.db` in the directory, or in another database, such as
    `postgresql+psycopg://user@host/database`.

    Raises:
        LabError: the database cannot be opened.
    """

    def __init__(self, directory: Path, name: str, url: str | None = None) -> None:
        self.name = printable(name)
        path = (directory / "study.db").resolve()
        self.url = url or f"sqlite:///{path}"
        self._advice = "" if url else f". Move {path} away: its trials are taken from {RECORDS_FILE}"
        with self._one_line("cannot open"):
            for _ in range(3):
                try:
                    self._storage = _open(self.url)
                    break
                except (OperationalError, IntegrityError, ProgrammingError):
                    time.sleep(_CREATION_SECONDS)  # another worker may be creating the tables
            else:
                self._storage = _open(self.url)
        if self.url.startswith("sqlite"):
            # Two workers that write at once wait for each other instead of failing.
            event.listen(self._storage.engine, "connect", _write_ahead)
            self._storage.engine.dispose()  # of connections made before
        self._studies: dict[tuple[str, str], optuna.Study] = {}
        self._trials: dict[tuple[str, str], list[FrozenTrial]] = {}
        self._records: dict[int, Record] = {}

    @contextmanager
    def _one_line(self, doing: str = "cannot use") -> Iterator[None]:
        """Turn whatever Optuna raises if a database is damaged, full, or out of reach, into one line."""
        try:
            yield
        except KeyError as error:
            raise LabError(
                f"{doing} the storage {self.url}: a study of {self.name} was deleted meanwhile, as --fresh "
                f"does, or is damaged. Run the command again; if that does not help, start with an empty one"
            ) from error
        except (LabError, optuna.TrialPruned):
            raise
        except _DAMAGE as error:
            # SQLAlchemy's own text would go on with the statement and a link.
            cause = error.orig if isinstance(error, DBAPIError) else error.__cause__ or error
            full = ": make room, and run the command again" if "disk is full" in str(cause) else self._advice
            raise LabError(
                f"{doing} the storage {self.url}: {type(cause).__name__}: {cause}{full}"
            ) from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of such blocks of the same experiment.

        Any database numbers trials one after the other, so a process waits for those with a lower number.
        That of one that died is given up like its trials.
        """
        turns = self.study("", _LOCK)
        with self._one_line():
            turn = turns.ask()
            turn.suggest_float("turn", 0, 1)  # one with values is not given up for its age
        try:
            with get_heartbeat_thread(turn._trial_id, self._storage):
                with self._one_line():
                    while any(
                        trial.number < turn.number
                        for trial in turns.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
                    ):
                        time.sleep(_WAIT_SECONDS)
                        self._give_up_stale(turns)
                yield
        finally:
            with self._one_line():
                turns.tell(turn, state=TrialState.FAIL, skip_if_finished=True)

    def clear(self) -> None:
        """Delete the experiment's studies.

        Raises:
            LabError: another process runs one of its trials.
        """
        with self._one_line():
            names = [
                name
                for name in optuna.get_all_study_names(self._storage)
                if name.startswith(f"{self.name}/") and name != f"{self.name}//{_LOCK}"
            ]
            for study in (optuna.load_study(study_name=name, storage=self._storage) for name in names):
                self._give_up_stale(study)
                if study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                    raise LabError(
                        f"another process is working on {self.name}: stop it before you start over. One that "
                        f"was killed counts for {GRACE_SECONDS} more seconds"
                    )
            for name in names:
                optuna.delete_study(study_name=name, storage=self._storage)
        self._studies.clear()
        self.refresh()

    def restore(self, experiment: Experiment, records: Sequence[Record]) -> None:
        """Take in records that the database lacks: a copied directory may have come without its own."""
        known = {
            record.key
            for optimizer in experiment.optimizers
            for phase in get_args(Phase)
            for record in self.finished(optimizer, phase)
        }
        for record in records:
            if record.key in known or not experiment.has(record):
                continue
            values: Mapping[str, float] = {"seed": float(record.seed)}
            space: Mapping[str, Any] = dict.fromkeys(values)
            if record.phase == "search":
                values, space = record.searched, experiment.optimizers[record.optimizer].space
            trial = create_trial(
                value=record.score(experiment.metric),
                params=dict(values),
                distributions={**_distributions(space)},
                user_attrs={_RECORD: record.model_dump(mode="json")},
            )
            study = self.study(record.optimizer, record.phase)
            with self._one_line():
                study.add_trial(trial)
        self.refresh()

    def refresh(self) -> None:
        """Forget what was read of the trials, so that the next call sees those of other workers."""
        self._trials.clear()

    def load_experiment(self) -> Experiment | None:
        """Return the experiment as it was last saved; None before that."""
        study = self.study("", "experiment")
        with self._one_line():
            saved = study.user_attrs.get(_EXPERIMENT)
            return None if saved is None else Experiment.model_validate(saved)

    def save_experiment(self, experiment: Experiment) -> None:
        """Save the experiment for all workers."""
        try:
            saved = experiment.model_dump(mode="json")
        except PydanticSerializationError as error:
            raise LabError(f"the task's config must be plain JSON values: {error}") from error
        study = self.study("", "experiment")
        with self._one_line():
            study.set_user_attr(_EXPERIMENT, saved)

    def study(self, optimizer: str, phase: str) -> optuna.Study:
        """Return an optimizer's study for a phase."""
        key = (optimizer, phase)
        if key not in self._studies:
            with self._one_line():
                self._studies[key] = optuna.create_study(
                    study_name=f"{self.name}/{optimizer}/{phase}", storage=self._storage, load_if_exists=True
                )
        return self._studies[key]

    def finished(self, optimizer: str, phase: str) -> list[Record]:
        """Return the records of the finished trials, oldest first, without duplicates."""
        found: dict[str, Record] = {}
        for trial in self._read(optimizer, phase, TrialState.COMPLETE):
            if trial._trial_id not in self._records:
                with self._one_line():
                    self._records[trial._trial_id] = Record.model_validate(trial.user_attrs[_RECORD])
            found.setdefault(str(sorted(trial.params.items())), self._records[trial._trial_id])
        return list(found.values())

    def running(self, optimizer: str, phase: str) -> list[dict[str, float]]:
        """Return the values of the trials that a live worker runs; trials of dead workers are given up."""
        if self._read(optimizer, phase, TrialState.RUNNING):
            study = self.study(optimizer, phase)
            with self._one_line():
                self._give_up_stale(study)
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
        the sampler repeats itself. Nor does it count if another worker has taken this one for dead.
        `objective` receives `values`, or if they are empty, those that `sampler` chooses within `ranges`; it
        returns the value to minimize, and the record.
        """
        study = self.study(optimizer, phase)
        # Not Optuna's queue of trials: another worker may take from it what this one has put there.
        study.sampler = PartialFixedSampler(dict(values), sampler or RandomSampler())
        spaces = _distributions(ranges or dict.fromkeys(values))
        ran = False
        begun: list[int] = []

        def body(trial: optuna.Trial) -> float:
            nonlocal ran
            begun.append(trial._trial_id)
            self._storage.record_heartbeat(trial._trial_id)
            chosen = {
                name: trial.suggest_float(name, space.low, space.high, log=space.log)
                for name, space in spaces.items()
            }
            if self._begun_before(study, trial):
                raise optuna.TrialPruned
            ran = True
            try:
                value, record = objective(chosen)
            except Exception as error:
                raise _ObjectiveError(error) from error
            trial.set_user_attr(_RECORD, record.model_dump(mode="json"))
            return value

        try:
            with self._one_line():
                try:
                    study.optimize(body, n_trials=1)
                except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
                    # This process was so slow, or suspended, that another runs its trial again.
                    if not begun or self._storage.get_trial(begun[0]).state != TrialState.FAIL:
                        raise
                    ran = False
        except _ObjectiveError as error:
            raise error.cause from error.cause.__cause__
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
            study = self.study(optimizer, phase)
            with self._one_line():
                self._trials[key] = study.get_trials(deepcopy=False)
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
