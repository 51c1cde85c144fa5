"""Where trials are kept: Optuna studies in a database that several workers can share.

Each optimizer has a study for every phase. A trial's record is an attribute of its Optuna trial, so the
database alone holds the whole experiment; `records.jsonl` is an export.
"""

from __future__ import annotations

import itertools
import sqlite3
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Timer
from typing import Any, get_args

import optuna
from filelock import FileLock
from optuna.distributions import FloatDistribution
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic_core import PydanticSerializationError
from sqlalchemy import Engine, create_engine, event, func, make_url, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from ..errors import LabError
from ..printable import printable, without_password
from ..records import RECORDS_FILE, Experiment, Phase, Range, Record

HEARTBEAT_SECONDS = 5
GRACE_SECONDS = 20
"""A trial whose worker has given no sign of life for this long is run again."""
_PATIENCE_SECONDS = 10

_EXPERIMENT = "experiment"
_RECORD = "record"
# What a database that is damaged, full, out of reach, or without its driver raises, through Optuna or not.
_DAMAGE = (SQLAlchemyError, sqlite3.Error, OptunaError, ImportError, ValueError, OSError)
# Values that the lab chooses itself may lie anywhere.
_ANY = FloatDistribution(-1e30, 1e30)

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", message="Heartbeat of storage")  # `run` does without Study.optimize


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
        self._advice = "" if url else f". Move {path} away: its trials are taken from {RECORDS_FILE}"
        url = url or f"sqlite:///{path}"
        self._place = without_password(url)
        with self._one_line("cannot open"):
            place = make_url(url)
            backend = place.get_backend_name()
            if backend not in ("sqlite", "postgresql") or place.database in (None, "", ":memory:"):
                raise LabError(f"the storage must be an SQLite file or in PostgreSQL, not {self._place}")
            connect = {"timeout": 60} if backend == "sqlite" else {}
            self._engine = create_engine(url)
            with _only_one(self._engine):  # another worker may be creating the tables
                self._storage = optuna.storages.RDBStorage(
                    url,
                    engine_kwargs={"connect_args": connect},
                    heartbeat_interval=HEARTBEAT_SECONDS,
                    grace_period=GRACE_SECONDS,
                )
        if backend == "sqlite":
            # Two workers that write at once wait for each other instead of failing.
            event.listen(self._storage.engine, "connect", _write_ahead)
            self._storage.engine.dispose()  # of connections made before
        self._studies: dict[tuple[str, str], optuna.Study] = {}
        self._trials: dict[tuple[str, str], list[FrozenTrial]] | None = None  # those read within the lock
        self._records: dict[int, Record] = {}

    @contextmanager
    def _one_line(self, doing: str = "cannot use") -> Iterator[None]:
        """Turn whatever Optuna raises if a database is damaged, full, or out of reach, into one line."""
        try:
            yield
        except KeyError as error:
            raise LabError(
                f"{doing} the storage {self._place}: a study of {self.name} was deleted meanwhile, as "
                f"--fresh does, or is damaged. Run the command again, or start with an empty storage"
            ) from error
        except LabError:
            raise
        except _DAMAGE as error:
            # SQLAlchemy's own text would go on with the statement and a link.
            cause = error.orig if isinstance(error, DBAPIError) else error.__cause__ or error
            text = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
            full = any(words in text for words in ("disk is full", "No space left"))
            advice = ": make room, and run the command again" if full else self._advice
            raise LabError(f"{doing} the storage {self._place}: {without_password(text)}{advice}") from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the block; a process that dies releases the lock.

        Within it, each study is read once, because a trial that ended between two reads would be in neither.
        """
        with ExitStack() as held:
            with self._one_line():
                held.enter_context(_only_one(self._engine))
            self._trials = {}
            self._studies.pop(("", "experiment"), None)  # another process may have deleted it
            try:
                yield
            finally:
                self._trials = None
                with self._one_line():
                    held.close()

    def clear(self) -> None:
        """Delete the experiment's studies, within `lock`.

        Raises:
            LabError: another process runs one of its trials.
        """
        with self._one_line():
            everyone = optuna.get_all_study_names(self._storage)
            names = [name for name in everyone if name.startswith(f"{self.name}/")]
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

    def restore(self, experiment: Experiment, records: Sequence[Record]) -> None:
        """Take in records that the database lacks: a copied directory may have come without its own."""
        known = {record.key for record in self.records(experiment.optimizers)}
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
        """Return the records of the finished trials, oldest first."""
        found = self._read(optimizer, phase, TrialState.COMPLETE)
        with self._one_line():
            for trial in found:
                if trial._trial_id not in self._records:
                    self._records[trial._trial_id] = Record.model_validate(trial.user_attrs[_RECORD])
        # Earlier versions could run a trial twice.
        return [*{each.key: each for each in (self._records[trial._trial_id] for trial in found)}.values()]

    def records(self, optimizers: Iterable[str]) -> list[Record]:
        """Return the records of all finished trials of these optimizers."""
        pairs = itertools.product(optimizers, get_args(Phase))
        return [record for pair in pairs for record in self.finished(*pair)]

    def running(self, optimizer: str, phase: str) -> list[dict[str, float]]:
        """Within `lock`, return the values of the trials that live workers run."""
        return [trial.params for trial in self._read(optimizer, phase, TrialState.RUNNING)]

    def tried(self, optimizer: str, phase: str) -> list[dict[str, float]]:
        """Within `lock`, return the searched values of the trials that are finished or run."""
        searched = [record.searched for record in self.finished(optimizer, phase)]
        return searched + self.running(optimizer, phase)

    def _give_up_stale(self, study: optuna.Study) -> None:
        optuna.storages.fail_stale_trials(study)
        # Optuna looks for late heartbeats. A worker that died as it claimed a trial has left none at all.
        for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if not trial.params:
                self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def claim(
        self,
        optimizer: str,
        phase: str,
        values: Mapping[str, float],
        ranges: Mapping[str, Range] = {},
        samplers: Sequence[BaseSampler] = (RandomSampler(),),
    ) -> optuna.Trial:
        """Within `lock`, begin a trial with `values`, or if empty, with the first sampler's untried ones."""
        study, tried = self.study(optimizer, phase), self.tried(optimizer, phase)
        for sampler in samplers:
            study.sampler = PartialFixedSampler(dict(values), sampler)
            with self._one_line():
                trial = study.ask()
                self._storage.record_heartbeat(trial._trial_id)
                for name, space in _distributions(ranges or dict.fromkeys(values)).items():
                    trial.suggest_float(name, space.low, space.high, log=space.log)
                self._storage.record_heartbeat(trial._trial_id)  # a sampler may take long
                if sampler is samplers[-1] or trial.params not in tried:
                    break
                study.tell(trial, state=TrialState.FAIL)
        if self._trials:
            self._trials.clear()
        return trial

    def run(self, trial: optuna.Trial, objective: Callable[[], tuple[float, Record]]) -> None:
        """Run a claimed trial and keep its record, unless another worker has taken this one for dead.

        `objective` returns the value to minimize, and the record."""
        result = None
        try:
            with get_heartbeat_thread(trial._trial_id, self._storage):
                result = objective()
        finally:
            with self._one_line(), suppress(UpdateFinishedTrialError):
                if result is None:
                    trial.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
                else:
                    trial.set_user_attr(_RECORD, result[1].model_dump(mode="json"))
                    trial.study.tell(trial, result[0], skip_if_finished=True)

    def _read(self, optimizer: str, phase: str, state: TrialState) -> list[FrozenTrial]:
        trials = (self._trials or {}).get((optimizer, phase))
        if trials is None:
            study = self.study(optimizer, phase)
            with self._one_line():
                trials = study.get_trials(deepcopy=False)
                if self._trials is not None:
                    if any(trial.state == TrialState.RUNNING for trial in trials):
                        self._give_up_stale(study)
                        trials = study.get_trials(deepcopy=False)
                    self._trials[optimizer, phase] = trials
        return [trial for trial in trials if trial.state == state]


def _distributions(space: Mapping[str, Range | object]) -> dict[str, FloatDistribution]:
    return {
        name: FloatDistribution(each.low, each.high, log=True) if isinstance(each, Range) else _ANY
        for name, each in space.items()
    }


@contextmanager
def _only_one(engine: Engine) -> Iterator[None]:
    """Keep out other processes of this database; one that dies, not one suspended, releases the lock."""
    # An address is quoted as UTF-8, which a path need not be.
    where = str(engine.url.database) if engine.name == "sqlite" else engine.url.render_as_string()
    text = f"waiting for the process that has locked {printable(where)}"
    notice = Timer(_PATIENCE_SECONDS, print, [text], {"file": sys.stderr})
    notice.start()
    with ExitStack() as held:
        try:
            if engine.name == "sqlite":
                held.enter_context(FileLock(f"{engine.url.database}.lock"))
            else:
                connection = held.enter_context(engine.begin())
                connection.execute(select(func.pg_advisory_xact_lock(0x57EE9E57)))
        finally:
            notice.cancel()
        yield


def _write_ahead(connection: Any, record: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    # With a write-ahead log this survives a crash of the process, and saves most of the waiting for the disk.
    connection.execute("PRAGMA synchronous=NORMAL")
