"""A line of JSON for every finished trial, appended at once, so that an interrupted race can go on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from .errors import LabError

Status = Literal["ok", "diverged"]
Phase = Literal["search", "seeds"]
Point = tuple[int, float, float]
"""Step, seconds of training so far, value."""


@dataclass(frozen=True)
class Assignment:
    """Which trial to run: the identity of a record."""

    phase: Phase
    """"search": trying a learning rate; "seeds": repeating the best with another seed."""
    round: int
    """In the search, how many trials the optimizer had before; among the seeds, the seed."""
    optimizer: str
    lr: float
    seed: int


@dataclass(frozen=True)
class Record:
    """All that is known of one finished trial."""

    phase: Phase
    round: int
    optimizer: str
    lr: float
    seed: int
    status: Status
    metric: float
    """The task's metric at the end; NaN if the trial diverged (null in the file)."""
    steps: int
    """Steps taken; fewer than planned only if the trial diverged."""
    curve: list[Point]
    """Training loss, each point the mean since the one before."""
    validation: list[Point]
    """The task's metric during training, from the untrained model on."""
    parameters: int
    state_bytes: int
    state_bytes_per_parameter: float
    optimizer_ms: float
    """Median milliseconds of `optimizer.step()` in this trial."""
    step_ms: float
    """Median milliseconds of a whole step in this trial."""
    seconds: float
    """The whole trial: building, training and evaluating."""
    schedule: str
    hyper: dict[str, Any]
    machine: dict[str, Any]

    @property
    def assignment(self) -> Assignment:
        """Which trial this is the record of."""
        return Assignment(self.phase, self.round, self.optimizer, self.lr, self.seed)

    @property
    def finite(self) -> bool:
        """Whether the trial ended with a metric that can be compared."""
        return self.status == "ok" and math.isfinite(self.metric)

    def to_json(self) -> str:
        """One line of strict JSON (NaN and infinities become null)."""
        return json.dumps(_without_nonfinite(asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The inverse of `to_json`.

        Raises:
            ValueError: the line is not the JSON of a record.
        """
        data = json.loads(line)
        if not isinstance(data, dict) or set(data) != {field.name for field in fields(cls)}:
            raise ValueError("not a trial's record")
        for name in ("curve", "validation"):
            data[name] = [(step, seconds, _nan_if_none(value)) for step, seconds, value in data[name]]
        for name in ("metric", "optimizer_ms", "step_ms"):
            data[name] = _nan_if_none(data[name])
        return cls(**data)


class RecordFile:
    """The records of one race, on disk.

    A last line torn by a crash is dropped, and overwritten by the next record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Record]:
        """All complete records, in the order they were written; none if there is no file.

        Raises:
            LabError: a line other than a torn last one is not a record.
        """
        records = []
        lines = self._whole_lines()
        for number, line in enumerate(lines, start=1):
            try:
                records.append(Record.from_json(line.decode()))
            except ValueError as error:
                raise LabError(
                    f"line {number} of {self.path} is not a trial's record; choose another folder or --fresh"
                ) from error
        return records

    def append(self, record: Record) -> None:
        """Write a record and make sure it is on the disk."""
        whole = sum(len(line) + 1 for line in self._whole_lines())
        with self.path.open("ab") as file:
            file.truncate(whole)
            file.write(record.to_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _whole_lines(self) -> list[bytes]:
        """The lines that end in a newline: a record is written with its newline last."""
        if not self.path.exists():
            return []
        return self.path.read_bytes().split(b"\n")[:-1]


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(item) for item in value]
    return value


def _nan_if_none(value: float | None) -> float:
    return math.nan if value is None else value
