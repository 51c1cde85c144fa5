"""Run an experiment's missing trials, alone or beside other workers.

Every optimizer gets the same number of search trials. The trials take turns among the optimizers, so that
an interrupted experiment has tried all of them about equally often. The final trials follow: seeds that the
search has not seen, with the best hyper-parameters and with the defaults.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import optuna
import torch

from ..analysis.target import mean_curve, steps_to_target
from ..errors import LabError
from ..files import remove_file
from ..progress import Callback
from ..records import (
    EXPERIMENT_FILE,
    RECORDS_FILE,
    RUN_FIELDS,
    Experiment,
    Phase,
    Range,
    Record,
    read_records,
    write_records,
)
from ..tasks.task import Task
from ..training.optimizers import OptimizerSpec
from ..training.schedule import Schedule
from ..training.trial import Observe, Trial, run_trial
from .sampler import make_sampler
from .storage import Storage

_WAIT_SECONDS = 1.0


def join(directory: Path, request: Callable[[Experiment | None], Experiment], storage: Storage) -> Experiment:
    """Return the experiment to run: a new one, or the one that the storage already holds, with additions.

    `request` returns what is wanted, and receives the experiment that is there. Optimizers and final seeds
    may be added to one, even to a finished one.

    Raises:
        LabError: the storage holds an experiment that differs otherwise; the message says in what.
    """
    with storage.lock():
        saved = find(directory, storage)
        wanted = _joined(directory, request(saved), saved)
        storage.restore(wanted, read_records(directory, saved.metrics) if saved else [])
        storage.save_experiment(wanted)
        wanted.save(directory)
    return wanted


def find(directory: Path, storage: Storage) -> Experiment | None:
    """Return the experiment of the storage, or of a directory that was copied without it; None if new.

    Raises:
        LabError: the directory holds files that would be replaced, but of which no experiment is known.
    """
    found = storage.load_experiment()
    if found is None and (directory / EXPERIMENT_FILE).exists():
        found = Experiment.load(directory).model_copy(update={"name": storage.name})
    if found is None and (directory / RECORDS_FILE).exists():
        raise LabError(
            f"there is {directory / RECORDS_FILE}, but no {EXPERIMENT_FILE} that says what it records: put "
            f"that back, or move {RECORDS_FILE} away"
        )
    return found


def start_over(directory: Path, storage: Storage) -> None:
    """Delete an experiment from the storage, and the files that it wrote itself."""
    with storage.lock():
        if find(directory, storage) is not None:
            if (directory / RECORDS_FILE).exists():
                Experiment.load(directory)  # refuses the files of others
            storage.clear()
            for name in (RECORDS_FILE, EXPERIMENT_FILE):
                remove_file(directory / name)


def _joined(directory: Path, wanted: Experiment, saved: Experiment | None) -> Experiment:
    if saved is not None:
        common = [label for label in wanted.optimizers if label in saved.optimizers]
        there, here = (_conditions(each, common) for each in (saved, wanted))
        differing = [
            f"{name} is {there.get(name)} there and {here.get(name)} here"
            for name in {**there, **here}
            if there.get(name) != here.get(name)
        ]
        if differing:
            raise LabError(
                f"{directory} holds another experiment: {'; '.join(differing)}. "
                "Choose another directory, or --fresh to start over"
            )
        grows = len(common) < len(wanted.optimizers) or not {*wanted.seeds} <= {*saved.seeds}
        again = not grows or wanted.command in saved.command.split("; ")
        command = saved.command if again else f"{saved.command}; {wanted.command}"
        seeds = sorted({*saved.seeds, *wanted.seeds})
        wanted = saved.joined(wanted).model_copy(update={"seeds": seeds, "command": command})
    return wanted


def _conditions(experiment: Experiment, labels: Sequence[str]) -> dict[str, Any]:
    """Return by name what two runs of one experiment must agree in; `labels` are the optimizers of both."""
    found = experiment.model_dump(mode="json", exclude=RUN_FIELDS | {"seeds"})
    for label in labels:
        entry = experiment.optimizers[label].model_dump(mode="json")
        fixed = {"entry": entry["entry"], **entry["hyperparameters"]}
        found |= {f"{label}'s {name}": value for name, value in fixed.items()}
        found |= {f"{label}'s range of {name}": values for name, values in entry["space"].items()}
    return found


@dataclass
class Runner:
    """Runs the missing trials of an experiment."""

    directory: Path
    """Where `records.jsonl` is exported."""
    experiment: Experiment
    """The experiment, as `join` returned it."""
    task: Task[Any]
    specs: dict[str, OptimizerSpec]
    """By label, the optimizers that this process can build."""
    storage: Storage
    schedule: Schedule
    callback: Callback
    observe: Observe | None = None
    """Adds further measurements to the records of the final trials."""

    def run(self) -> list[Record]:
        """Run all missing trials, wait for those of other workers, and return all records."""
        records = self.export()
        shown = {record.key for record in records}
        try:
            self.callback.on_start(self.experiment, records)
            going = True
            while going:
                with self.storage.lock():
                    claimed = self._claim()
                    going = claimed is not None or self._others_run()
                if claimed is not None:
                    self._run(*claimed)
                elif going:
                    time.sleep(_WAIT_SECONDS)
                records = self.records()
                if new := [record for record in records if record.key not in shown]:
                    write_records(self.directory, records)
                for record in new:
                    shown.add(record.key)
                    self.callback.on_trial_end(record)
        finally:
            # The other workers of this command stop first, so that no older export replaces this one.
            try:
                self.callback.on_end()
            finally:
                records = self.export()
        return records

    def _give_up(self, label: str) -> None:
        """Take an optimizer that needs too much memory out of the experiment, and say so."""
        with self.storage.lock():
            saved = self.storage.load_experiment() or self.experiment
            entries = {name: entry for name, entry in saved.optimizers.items() if name != label}
            not_run = {**saved.not_run, label: "it ran out of memory"}
            self.experiment = saved.model_copy(update={"optimizers": entries, "not_run": not_run})
            self.storage.save_experiment(self.experiment)
            self.experiment.save(self.directory)
        # Another worker may have given up others.
        self.specs = {name: spec for name, spec in self.specs.items() if name in entries}
        self.callback.message(f"{label} ran out of memory and is not run")

    def records(self) -> list[Record]:
        """Return the finished trials."""
        # Another process may have added optimizers.
        saved = self.storage.load_experiment() or self.experiment
        return self.storage.records(saved.optimizers)

    def export(self) -> list[Record]:
        """Write `records.jsonl` and return the records."""
        records = self.records()
        write_records(self.directory, records)
        return records

    def _claim(self) -> tuple[Trial, optuna.Trial] | None:
        """Return the next missing trial, begun in the storage; None if there is none at the moment."""
        saved = self.storage.load_experiment()
        if saved is None or saved.created != self.experiment.created:
            raise LabError(
                f"{self.experiment.name} was deleted meanwhile, as --fresh does: run the command again"
            )
        trial = self._next_search() or self._next_final()
        if trial is None:
            return None
        if trial.phase != "search":
            return trial, self.storage.claim(trial.optimizer, trial.phase, {"seed": float(trial.seed)})
        space = self.experiment.optimizers[trial.optimizer].space
        ranges = {name: each for name, each in space.items() if isinstance(each, Range)}
        seed, number = self.experiment.search_seed, len(self.storage.tried(trial.optimizer, "search"))
        samplers = [make_sampler(seed, number, anywhere=anywhere) for anywhere in (False, True)]
        claimed = self.storage.claim(trial.optimizer, "search", trial.values, ranges, samplers)
        return replace(trial, values=claimed.params), claimed

    def _next_search(self) -> Trial | None:
        """Return the next trial of the searches; one without values leaves them to the sampler."""
        experiment = self.experiment
        searched = [label for label in self.specs if experiment.optimizers[label].space]
        tried = {label: self.storage.tried(label, "search") for label in searched}
        label = min(tried, key=lambda name: len(tried[name]), default="")
        if not label or len(tried[label]) >= experiment.trials:
            return None
        space = experiment.optimizers[label].space
        # The middle of ranges is the default lr in a race, the best so far in a narrower search.
        ranges = {name: each for name, each in space.items() if isinstance(each, Range)}
        fixed = grid(space) or [{name: math.sqrt(each.low * each.high) for name, each in ranges.items()}]
        values = next((each for each in fixed if each not in tried[label]), {})
        return Trial(label, "search", experiment.search_seed, values, experiment.steps)

    def _next_final(self) -> Trial | None:
        for trial in self._finals():
            done = [record.seed for record in self.storage.finished(trial.optimizer, trial.phase)]
            running = self.storage.running(trial.optimizer, trial.phase)
            if trial.seed not in done and {"seed": float(trial.seed)} not in running:
                return trial
        return None

    def _finals(self) -> Iterator[Trial]:
        """Yield all final trials whose hyper-parameters are known by now, in the order in which they run."""
        experiment = self.experiment
        best = {label: self._best(label) for label in self.specs}
        for seed, (label, values) in itertools.product(experiment.seeds, best.items()):
            if values is not None:
                yield Trial(label, "tuned", seed, values, experiment.steps)
        for seed, label in itertools.product(experiment.seeds, best):
            if experiment.optimizers[label].space:
                yield Trial(label, "default", seed, {}, experiment.steps)
        for label, values in best.items():
            steps = self._decayed_steps(label)
            if values is not None and steps is not None:
                for seed in experiment.seeds:
                    yield Trial(label, "decayed", seed, values, steps)

    def _best(self, label: str) -> dict[str, float] | None:
        """Return the best values of a finished search; None before its end and if every trial diverged."""
        if not self.experiment.optimizers[label].space:
            return {}
        found = self.storage.finished(label, "search")
        if len(found) < self.experiment.trials:
            return None
        best = self.experiment.best(found)
        return None if best is None else best.searched

    def _decayed_steps(self, label: str) -> int | None:
        """Return the step before the end at which the tuned optimizer reaches the baseline's final metric."""
        experiment = self.experiment
        baseline = experiment.baseline
        # A constant learning rate ends the same way at every step.
        if baseline not in experiment.optimizers or label == baseline or self.schedule.decay == "constant":
            return None
        if done := self.storage.finished(label, "decayed"):
            # Seeds that were added later must not move the target.
            return done[0].steps
        both = [self.storage.finished(name, "tuned") for name in (baseline, label)]
        if min(map(len, both)) < len(experiment.seeds):
            return None
        target, own = (mean_curve(tuned, experiment.metric) for tuned in both)
        step = steps_to_target(own, target[-1][1]) if target else None
        return None if step is None or math.ceil(step) >= experiment.steps else max(1, math.ceil(step))

    def _others_run(self) -> bool:
        pairs = itertools.product(self.experiment.optimizers, get_args(Phase))
        return any(self.storage.running(label, phase) for label, phase in pairs)

    def _run(self, trial: Trial, claimed: optuna.Trial) -> None:
        metric = self.experiment.metric

        def objective() -> tuple[float, Record]:
            self.callback.on_trial_start(trial)
            record = run_trial(
                self.task,
                self.specs[trial.optimizer],
                trial,
                experiment=self.experiment.name,
                schedule=self.schedule,
                on_step=self.callback.on_step,
                observe=None if trial.phase == "search" else self.observe,
            )
            # A search needs finite values.
            untrained = record.validation[0].metrics[metric.name]
            if not math.isfinite(untrained):
                raise LabError(
                    f"task {self.task.name!r}: {metric.name} of the untrained model is {abs(untrained)}"
                )
            return record.score(metric), record

        try:
            self.storage.run(claimed, objective)
        except (RuntimeError, MemoryError) as error:
            # Torch has an error of its own on accelerators only.
            own = isinstance(error, torch.OutOfMemoryError | MemoryError)
            if not own and "can't allocate memory" not in str(error):
                raise
            self._give_up(trial.optimizer)


def grid(space: Mapping[str, Any]) -> list[dict[str, float]]:
    """Return all combinations of lists of values; none if the space has ranges.

    Example:
        >>> grid({"lr": [0.1, 0.2], "weight_decay": [0.0]})
        [{'lr': 0.1, 'weight_decay': 0.0}, {'lr': 0.2, 'weight_decay': 0.0}]
    """
    if not space or not all(isinstance(values, list) for values in space.values()):
        return []
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
