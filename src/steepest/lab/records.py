"""What an experiment leaves on disk: one `experiment.json` and a line of `records.jsonl` per trial."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import LabError
from .files import read_file, replace_file
from .printable import Printable, PrintableValues

EXPERIMENT_FILE = "experiment.json"
RECORDS_FILE = "records.jsonl"

Phase = Literal["search", "tuned", "default", "decayed"]
"""`search` tries hyper-parameters and sees validation data only. The others train with the final seeds:
`tuned` with the search's best hyper-parameters (as given if nothing is searched), `default` with the
optimizer's own, and `decayed` as `tuned`, but with the schedule ending at the step at which `tuned` reached
the baseline's final metric."""

FINAL_PHASES: tuple[Phase, ...] = ("tuned", "default", "decayed")

RUN_FIELDS = {"optimizers", "not_run", "costs", "notes", "command", "revision", "machine", "created"}
"""The fields in which two runs of one experiment may differ."""


class _Model(BaseModel):
    # NaN and infinity as strings: the files are strict JSON, and pydantic reads the strings back as floats.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Metric(_Model):
    """A metric's name and direction.

    Example:
        >>> Metric(name="accuracy", unit="%", lower_is_better=False).score(97.5)
        -97.5
    """

    name: Printable
    unit: Printable = ""
    lower_is_better: bool = True

    def score(self, value: float) -> float:
        """Return the value with its sign chosen so that lower is better."""
        return value if self.lower_is_better else -value


class Evaluation(_Model):
    """The metrics after a number of steps."""

    step: int
    seconds: float
    """Training seconds so far, without the evaluations."""
    metrics: dict[Printable, float]


class Record(_Model):
    """One finished trial."""

    version: Literal[1] = 1
    experiment: Printable
    task: Printable
    optimizer: Printable
    phase: Phase
    seed: int
    searched: dict[Printable, float]
    """The values of the searched hyper-parameters, such as lr and weight_decay. Empty in phase `default`."""
    hyperparameters: PrintableValues
    """All hyper-parameters of the optimizer in this trial, including the searched ones."""
    status: Literal["finished", "diverged"]
    steps: int
    """The steps planned, after which the schedule ends."""
    last_step: int
    """The steps taken; fewer than planned only if the trial diverged."""
    training_loss: list[tuple[int, float, float]]
    """Points (step, training seconds, mean loss since the previous point)."""
    validation: list[Evaluation] = Field(min_length=1)
    """Metrics on validation data, starting with the untrained model at step 0."""
    test: dict[Printable, float] | None
    """Metrics on test data at `chosen_step`; None in phase `search` and for diverged trials."""
    chosen_step: int
    """The step whose weights were tested: the last, or the best by validation if the task says so."""
    parameters: int = Field(gt=0)
    state_bytes: int
    seconds: float
    """Seconds of the whole trial, building, training and evaluating, on a machine that may be busy."""
    schedule: Printable
    machine: dict[Printable, Printable | int]
    series: dict[Printable, list[tuple[int, float]]] = Field(default_factory=dict)
    """Further measurements over the steps, by name, for example local gains."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Record:
        if self.finished and all(each.step != self.chosen_step for each in self.validation):
            raise ValueError(f"no metrics on validation data at the chosen step {self.chosen_step}")
        return self

    @property
    def key(self) -> tuple[object, ...]:
        """What identifies the trial within its experiment."""
        return self.optimizer, self.phase, self.seed, self.steps, *sorted(self.searched.items())

    @property
    def finished(self) -> bool:
        """Whether the trial ended with finite metrics."""
        return self.status == "finished"

    def validated(self, metric: str) -> float:
        """Return a validation metric of the weights that the trial kept; NaN if it diverged."""
        if not self.finished:
            return math.nan
        return next(e.metrics[metric] for e in self.validation if e.step == self.chosen_step)

    def tested(self, metric: str) -> float:
        """Return a test metric; NaN if there is none."""
        return math.nan if self.test is None else self.test.get(metric, math.nan)

    def score(self, metric: Metric) -> float:
        """Return what a search minimizes: the score, at worst the untrained model's; diverging has that."""
        untrained = metric.score(self.validation[0].metrics[metric.name])
        return min(metric.score(self.validated(metric.name)), untrained) if self.finished else untrained


class Cost(_Model):
    """What one optimizer's step costs on one model; all optimizers were timed in turns."""

    optimizer: Printable
    model: Printable
    parameters: int
    state_bytes: int
    optimizer_ms: float | None
    """Median milliseconds of `optimizer.step()`; None if the model did not fit and was only planned."""
    optimizer_ms_quartiles: tuple[float, float] | None = None
    gradient_ms: float | None = None
    """Median milliseconds of a forward and backward pass of the same model."""
    peak_bytes: int | None = None
    """Peak bytes during a step beyond parameters and gradients, state included; None if not measured."""
    ratio: float | None = None
    """The step's time divided by the baseline's, the median of the ratios within rounds."""
    bandwidth: float | None = None
    """The rate at which the step moves the bytes that it must, as a fraction of axpy's (p + a·g) in the same
    rounds. It must read the gradients, and read and write parameters and state. A step far below 1 is limited
    by something else: arithmetic, kernel launches, or temporaries that travel to memory and back."""
    planned: bool = False
    """Whether the bytes come from `steepest.plan` on the meta device, because the model did not fit."""

    @property
    def step_ms(self) -> float:
        """Milliseconds of a training step, gradient and optimizer; NaN if they were not timed."""
        if self.gradient_ms is None or self.optimizer_ms is None:
            return math.nan
        return self.gradient_ms + self.optimizer_ms


class Range(_Model):
    """A range that a search covers on a logarithmic axis."""

    low: float = Field(gt=0)
    high: float


class OptimizerEntry(_Model):
    """An optimizer of an experiment."""

    entry: Printable
    """How the request named it, for example `muon` or `torch.optim:AdamW`."""
    hyperparameters: PrintableValues
    """Its hyper-parameters in phase `default`."""
    space: dict[Printable, Range | list[float]]
    """What the search varies: by name, a range, or the values of a grid."""


class Experiment(_Model):
    """What was asked and how it was run."""

    version: Literal[1] = 1
    name: Printable
    kind: Printable
    """`race`, `sweep`, or a study's name."""
    title: Printable
    task: Printable
    config: PrintableValues
    """The task's sizes and data."""
    metrics: list[Metric]
    """The first one is the primary metric: the search minimizes it and the ranking sorts by it."""
    steps: int
    schedule: Printable
    trials: int
    """Trials of each optimizer's search."""
    search_seed: int
    seeds: list[int]
    """The final seeds, which the search does not use."""
    baseline: Printable | None
    optimizers: dict[Printable, OptimizerEntry]
    not_run: dict[Printable, Printable] = Field(default_factory=dict)
    """Requested optimizers that were not run, with the reason."""
    costs: dict[Printable, Cost] = Field(default_factory=dict)
    notes: list[Printable] = Field(default_factory=list)
    """Further conditions for the page, a sentence each."""
    command: Printable
    revision: Printable
    machine: dict[Printable, Printable | int]
    created: Printable

    @property
    def metric(self) -> Metric:
        """The primary metric."""
        return self.metrics[0]

    def best(self, records: Iterable[Record]) -> Record | None:
        """Return the record with the best primary metric on validation data; None if all diverged."""
        finished = (record for record in records if record.finished)
        return min(finished, key=lambda r: self.metric.score(r.validated(self.metric.name)), default=None)

    def has(self, record: Record) -> bool:
        """Return whether a record is of a trial that this experiment may have run."""
        entry = self.optimizers.get(record.optimizer)
        if entry is None or (record.task, record.schedule) != (self.task, self.schedule):
            return False
        if record.phase == "search":
            return record.steps == self.steps and {*record.searched} == {*entry.space}
        return record.phase == "decayed" or record.steps == self.steps

    def joined(self, later: Experiment) -> Experiment:
        """Return this experiment with what a later run adds; of what both have, the later one's stays."""
        optimizers = {**self.optimizers, **later.optimizers}
        not_run = {**self.not_run, **later.not_run}
        return self.model_copy(
            update={
                "optimizers": optimizers,
                "not_run": {name: why for name, why in not_run.items() if name not in optimizers},
                "costs": {**self.costs, **later.costs},
                "notes": list(dict.fromkeys([*self.notes, *later.notes])),
                "baseline": self.baseline or later.baseline,
            }
        )

    def save(self, directory: Path) -> None:
        """Write `experiment.json` atomically."""
        replace_file(directory / EXPERIMENT_FILE, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Experiment:
        """Read `experiment.json`.

        Raises:
            LabError: there is none, or this version cannot read it.
        """
        path = directory / EXPERIMENT_FILE
        if not path.exists():
            raise LabError(f"{directory} holds no experiment: there is no {EXPERIMENT_FILE}")
        try:
            return cls.model_validate_json(read_file(path))
        except ValidationError as error:
            raise LabError(
                f"{path} is not an experiment that this version can read: {_first(error)}. Put back a copy, "
                "or move it away; if the directory has its study.db, the experiment's command writes it again"
            ) from error


def read_records(directory: Path, metrics: Iterable[Metric] = ()) -> list[Record]:
    """Return the records of a directory; an incomplete last line, left by a crash, is ignored.

    Raises:
        LabError: a whole line is not a record of this version, or one without these metrics.
    """
    path = directory / RECORDS_FILE
    if not path.exists():
        return []
    records, needed = [], dict.fromkeys(metric.name for metric in metrics)
    for number, line in enumerate(read_file(path).split(b"\n")[:-1], start=1):
        try:
            record = Record.model_validate_json(line)
            for measured in (*(each.metrics for each in record.validation), record.test or needed):
                if missing := needed.keys() - measured.keys():
                    raise LabError(f"it has no {', '.join(sorted(missing))}")
        except ValueError as error:
            why = _first(error) if isinstance(error, ValidationError) else error
            raise LabError(
                f"line {number} of {path} is not a record: {why}. Delete the line, and run the experiment's "
                "command again: the trial is taken from study.db, or trained again"
            ) from error
        records.append(record)
    return records


def write_records(directory: Path, records: list[Record]) -> None:
    """Replace the records of a directory atomically."""
    lines = "".join(record.model_dump_json() + "\n" for record in records)
    replace_file(directory / RECORDS_FILE, lines)


def _first(error: ValidationError) -> str:
    detail = error.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, detail["loc"])), detail["msg"])))
