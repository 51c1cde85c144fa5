"""Run an experiment's missing trials, alone or beside other workers.

Every optimizer gets the same number of search trials. The trials take turns among the optimizers, so that
an interrupted experiment has tried all of them about equally often. The final trials follow: seeds that the
search has not seen, with the best hyper-parameters and with the defaults.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import records as files
from ..analysis.target import mean_curve, steps_to_target
from ..errors import LabError
from ..progress import Callback
from ..records import Experiment, OptimizerEntry, Phase, Range, Record
from ..tasks.task import Task
from ..training.optimizers import OptimizerSpec
from ..training.schedule import Schedule
from ..training.trial import Observe, Trial, run_trial
from .sampler import make_sampler
from .storage import Storage

_WAIT_SECONDS = 1.0


def join(directory: Path, wanted: Experiment, storage: Storage) -> Experiment:
    """Return the experiment to run: `wanted`, or the one that the storage already holds, with its additions.

    Optimizers and final seeds may be added to an experiment, even to a finished one.

    Raises:
        LabError: the storage holds an experiment that differs otherwise; the message says in what.
    """
    saved = storage.load_experiment()
    if saved is not None:
        # As it will be read: JSON knows no tuples.
        wanted = Experiment.model_validate_json(wanted.model_dump_json())
        free = {
            "optimizers",
            "not_run",
            "seeds",
            "costs",
            "command",
            "revision",
            "machine",
            "created",
            "notes",
        }
        differing = [
            f"{name} is {getattr(saved, name)} there and {getattr(wanted, name)} here"
            for name in Experiment.model_fields
            if name not in free and getattr(saved, name) != getattr(wanted, name)
        ]
        differing += [
            f"{label}'s {name} is {there.get(name)} there and {here.get(name)} here"
            for label, entry in wanted.optimizers.items()
            if label in saved.optimizers
            for here, there in [(_flat(entry), _flat(saved.optimizers[label]))]
            for name in {**there, **here}
            if here.get(name) != there.get(name)
        ]
        if differing:
            raise LabError(
                f"{directory} holds another experiment: {'; '.join(differing)}. "
                "Choose another directory, or --fresh to start over"
            )
        added = {**saved.optimizers, **wanted.optimizers}
        grows = not (added.keys() <= saved.optimizers.keys() and {*wanted.seeds} <= {*saved.seeds})
        wanted = saved.model_copy(
            update={
                "optimizers": added,
                "not_run": {k: v for k, v in {**saved.not_run, **wanted.not_run}.items() if k not in added},
                "seeds": sorted({*saved.seeds, *wanted.seeds}),
                "costs": {**saved.costs, **wanted.costs},
                "notes": list(dict.fromkeys([*saved.notes, *wanted.notes])),
                "command": f"{saved.command}; {wanted.command}" if grows else saved.command,
            }
        )
    storage.save_experiment(wanted)
    wanted.save(directory)
    return wanted


def _flat(entry: OptimizerEntry) -> dict[str, Any]:
    searched = {f"range of {name}": values for name, values in entry.space.items()}
    return {"entry": entry.entry, **entry.hyperparameters, **searched}


@dataclass(frozen=True)
class _Job:
    trial: Trial
    chosen: bool = True
    """Whether the values are fixed; otherwise the search's sampler chooses them."""


class Runner:
    """Runs the missing trials of an experiment.

    Args:
        directory: Where `records.jsonl` is exported.
        experiment: The experiment, as `join` returned it.
        task: Its task.
        specs: Its optimizers.
        storage: Its storage.
        schedule: The learning-rate schedule of every trial.
        callback: Receives progress events.
        observe: Adds further measurements to the records of the final trials.
    """

    def __init__(
        self,
        directory: Path,
        experiment: Experiment,
        task: Task[Any],
        specs: Sequence[OptimizerSpec],
        storage: Storage,
        schedule: Schedule,
        callback: Callback,
        observe: Observe | None = None,
    ) -> None:
        self._directory = directory
        self._experiment = experiment
        self._task = task
        self._specs = {spec.label: spec for spec in specs}
        self._storage = storage
        self._schedule = schedule
        self._callback = callback
        self._observe = observe
        self._repeated = False

    def run(self) -> list[Record]:
        """Run all missing trials, wait for those of other workers, and return all records."""
        records = self.export()
        self._shown = {_key(record) for record in records}
        try:
            self._callback.on_start(self._experiment, records)
            while True:
                self._storage.refresh()
                self._show_new()
                job = self._next()
                if job is not None:
                    try:
                        self._run(job)
                    except (RuntimeError, MemoryError) as error:
                        if not _out_of_memory(error):
                            raise
                        self._give_up(job.trial.optimizer)
                elif self._next(alone=True) is not None or self._others_run():
                    time.sleep(_WAIT_SECONDS)
                else:
                    break
        finally:
            # The other workers of this command stop first, so that no older export replaces this one.
            try:
                self._callback.on_end()
            finally:
                records = self.export()
        return records

    def _give_up(self, label: str) -> None:
        """Take an optimizer that needs too much memory out of the experiment, and say so."""
        entries = {name: entry for name, entry in self._experiment.optimizers.items() if name != label}
        not_run = {**self._experiment.not_run, label: "it ran out of memory"}
        self._experiment = self._experiment.model_copy(update={"optimizers": entries, "not_run": not_run})
        self._storage.save_experiment(self._experiment)
        self._experiment.save(self._directory)
        del self._specs[label]
        self._callback.message(f"{label} ran out of memory and is not run")

    def _show_new(self) -> None:
        """Report the trials that finished since the last time, those of other workers too."""
        for record in self.records():
            if _key(record) not in self._shown:
                self._shown.add(_key(record))
                self._callback.on_trial_end(record)

    def records(self) -> list[Record]:
        """Return the finished trials, for every optimizer the same number of search trials at most."""
        # Another process may have added optimizers.
        saved = self._storage.load_experiment() or self._experiment
        found: list[Record] = []
        for label in saved.optimizers:
            found += [record for _, record in self._searched(label)]
            for phase in files.FINAL_PHASES:
                found += [record for _, record in self._storage.finished(label, phase)]
        return found

    def export(self) -> list[Record]:
        """Write `records.jsonl` and return the records."""
        self._storage.refresh()
        records = self.records()
        files.write_records(self._directory, records)
        return records

    def _searched(self, label: str) -> list[tuple[dict[str, float], Record]]:
        # Two workers may have started the last trial at once.
        return self._storage.finished(label, "search")[: self._experiment.trials]

    def _running(self, label: str, phase: Phase, alone: bool) -> list[dict[str, float]]:
        return [] if alone else self._storage.running(label, phase)

    def _next(self, alone: bool = False) -> _Job | None:
        """Return the next trial that nobody runs; if `alone`, the next that has not finished."""
        return self._next_search(alone) or self._next_final(alone)

    def _next_search(self, alone: bool) -> _Job | None:
        experiment = self._experiment
        tried = {
            label: [values for values, _ in self._searched(label)] + self._running(label, "search", alone)
            for label in self._specs
            if experiment.optimizers[label].space
        }
        missing = [label for label, values in tried.items() if len(values) < experiment.trials]
        if not missing:
            return None
        label = min(missing, key=lambda name: len(tried[name]))
        space = experiment.optimizers[label].space
        fixed = grid(space) or [_middle(space)]
        untried = [values for values in fixed if values not in tried[label]]
        if untried:
            return self._job(label, "search", experiment.search_seed, untried[0])
        return _Job(Trial(label, "search", experiment.search_seed, {}, experiment.steps), chosen=False)

    def _next_final(self, alone: bool) -> _Job | None:
        experiment = self._experiment
        best = {label: self._best(label) for label in self._specs}
        for phase in ("tuned", "default"):
            for seed, label in itertools.product(experiment.seeds, self._specs):
                searched = bool(experiment.optimizers[label].space)
                values = best[label] if phase == "tuned" else {} if searched else None
                if values is not None and not self._known(label, phase, seed, alone):
                    return self._job(label, phase, seed, values)
        for label in self._specs:
            steps = self._decayed_steps(label)
            values = best[label]
            if steps is None or values is None:
                continue
            for seed in experiment.seeds:
                if not self._known(label, "decayed", seed, alone):
                    return self._job(label, "decayed", seed, values, steps)
        return None

    def _job(
        self, label: str, phase: Phase, seed: int, values: Mapping[str, float], steps: int | None = None
    ) -> _Job:
        return _Job(Trial(label, phase, seed, values, steps or self._experiment.steps))

    def _known(self, label: str, phase: Phase, seed: int, alone: bool) -> bool:
        done = [record.seed for _, record in self._storage.finished(label, phase)]
        return seed in done or {"seed": float(seed)} in self._running(label, phase, alone)

    def _best(self, label: str) -> dict[str, float] | None:
        """Return the best values of a finished search; None before its end and if every trial diverged."""
        if not self._experiment.optimizers[label].space:
            return {}
        found = self._searched(label)
        # One trial too many may still run, but be older than a finished one, which it will then replace.
        if len(found) < self._experiment.trials or self._storage.running(label, "search"):
            return None
        metric = self._experiment.metric
        finite = [
            (metric.score(record.validated(metric.name)), values)
            for values, record in found
            if record.finished
        ]
        return min(finite, key=lambda pair: pair[0])[1] if finite else None

    def _decayed_steps(self, label: str) -> int | None:
        """Return the step before the end at which the tuned optimizer reaches the baseline's final metric."""
        experiment = self._experiment
        baseline = experiment.baseline
        # A constant learning rate ends the same way at every step.
        if baseline not in experiment.optimizers or label == baseline or self._schedule.decay == "constant":
            return None
        done = self._storage.finished(label, "decayed")
        if done:
            # Seeds that were added later must not move the target.
            return done[0][1].steps
        curves = []
        for name in (baseline, label):
            tuned = [record for _, record in self._storage.finished(name, "tuned")]
            if len(tuned) < len(experiment.seeds):
                return None
            curves.append(mean_curve(tuned, experiment.metric))
        if not all(curves):
            return None
        step = steps_to_target(curves[1], curves[0][-1][1])
        return None if step is None or math.ceil(step) >= experiment.steps else max(1, math.ceil(step))

    def _others_run(self) -> bool:
        return any(
            self._storage.running(label, phase)
            for label in self._experiment.optimizers
            for phase in ("search", *files.FINAL_PHASES)
        )

    def _run(self, job: _Job) -> None:
        trial = job.trial
        space = self._experiment.optimizers[trial.optimizer].space
        metric = self._experiment.metric
        searching = trial.phase == "search"

        def objective(values: dict[str, float]) -> tuple[float, Record]:
            this = replace(trial, values=values) if searching else trial
            self._callback.on_trial_start(this)
            record = run_trial(
                self._task,
                self._specs[trial.optimizer],
                this,
                experiment=self._experiment.name,
                schedule=self._schedule,
                on_step=self._callback.on_step,
                observe=None if searching else self._observe,
            )
            # A search needs finite values; diverging is as bad as not training.
            untrained = metric.score(record.validation[0].metrics[metric.name])
            if not math.isfinite(untrained):
                raise LabError(
                    f"task {self._task.name!r}: {metric.name} of the untrained model is {abs(untrained)}"
                )
            score = metric.score(record.validated(metric.name)) if record.finished else untrained
            return min(score, untrained), record

        number = len(
            self._storage.finished(trial.optimizer, "search")
            + self._storage.running(trial.optimizer, "search")
        )
        ranges = {n: (each.low, each.high) for n, each in space.items() if isinstance(each, Range)}
        self._repeated = not self._storage.run(
            trial.optimizer,
            trial.phase,
            objective,
            values=(trial.values if searching else {"seed": float(trial.seed)}) if job.chosen else None,
            ranges=ranges if searching and ranges else None,
            sampler=None
            if job.chosen
            else make_sampler(self._experiment.search_seed, number, anywhere=self._repeated),
        )


def _middle(space: Mapping[str, Any]) -> dict[str, float]:
    """Return the middle of every range: the default lr in a race, the best so far in a narrower search."""
    return {name: math.sqrt(each.low * each.high) for name, each in space.items()}


def _out_of_memory(error: Exception) -> bool:
    # Torch has an error of its own on accelerators only.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _key(record: Record) -> tuple[Any, ...]:
    return record.optimizer, record.phase, record.seed, *record.searched.items()


def grid(space: Mapping[str, Any]) -> list[dict[str, float]]:
    """Return all combinations of lists of values; none if the space has ranges.

    Example:
        >>> grid({"lr": [0.1, 0.2], "weight_decay": [0.0]})
        [{'lr': 0.1, 'weight_decay': 0.0}, {'lr': 0.2, 'weight_decay': 0.0}]
    """
    if not space or not all(isinstance(values, list) for values in space.values()):
        return []
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
