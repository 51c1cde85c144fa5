"""Directories of experiments as the sections of one report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd

from ..analysis import fairness, frame
from ..analysis.ranking import Row, rank
from ..files import parse_path
from ..records import RUN_FIELDS, Experiment, Record, read_records


@dataclass
class Section:
    """An experiment with its records; several directories of the same experiment are one."""

    experiment: Experiment
    records: list[Record]
    commands: list[str]
    longer: list[Record] = field(default_factory=list)
    """Records of later sections of the report that differ in the number of steps and the search alone."""

    @cached_property
    def trials(self) -> pd.DataFrame:
        """A row per trial."""
        return frame.trials(self.experiment, self.records)

    @cached_property
    def rows(self) -> list[Row]:
        """The ranking."""
        return rank(self.experiment, self.records)

    @cached_property
    def warnings(self) -> list[str]:
        """What makes the comparison unfair, incomplete or meaningless."""
        return fairness.warnings(self.experiment, self.records, self.rows)

    @property
    def conditions(self) -> list[str]:
        """Under which conditions the optimizers were compared."""
        return fairness.conditions(self.experiment, self.records)

    @property
    def machines(self) -> list[str]:
        """Every machine that trained or timed."""
        found = [self.experiment.machine, *(record.machine for record in self.records)]
        return [*dict.fromkeys(", ".join(f"{key} {value}" for key, value in each.items()) for each in found)]

    @property
    def names(self) -> list[str]:
        """All optimizers, including those that have no record."""
        measured = [cost.optimizer for cost in self.experiment.costs.values()]
        return list(dict.fromkeys([*self.experiment.optimizers, *measured]))


def load(directories: Iterable[str | Path]) -> list[Section]:
    """Read directories, finished or not; those that hold the same experiment become one section.

    Two are the same if task, sizes, data, metrics, steps, schedule, trials and seeds agree. The optimizers of
    the second join the first.

    Raises:
        LabError: a directory holds no experiment, or one that this version cannot read.
    """
    sections: dict[str, Section] = {}
    for directory in map(parse_path, directories):
        experiment = Experiment.load(directory)
        records = read_records(directory, experiment.metrics)
        key = experiment.model_dump_json(exclude=RUN_FIELDS | {"name", "title", "baseline"})
        command = f"{experiment.command}  # revision {experiment.revision}"
        first = sections.setdefault(key, Section(experiment, [], []))
        first.experiment = first.experiment.joined(experiment)
        first.records = frame.distinct([*first.records, *records])
        first.commands = list(dict.fromkeys([*first.commands, command]))
    first_of: dict[str, Section] = {}
    for section in sections.values():
        same = section.experiment.model_dump_json(include={"kind", "task", "config", "metrics"})
        if (first := first_of.setdefault(same, section)) is not section:
            first.longer += section.records
    return list(sections.values())


def ranking(directory: str | Path) -> list[Row]:
    """Return a row for every optimizer of the experiment in `directory`, finished or not, best first.

    Raises:
        LabError: the directory holds no experiment.
    """
    return load([directory])[0].rows
