"""Trial records: a line of JSON for every finished trial, so that an interrupted race can resume."""

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
"""Step, training seconds so far, value."""


@dataclass(frozen=True)
class TrialSpec:
    """The parameters that identify a trial and its record."""

    phase: Phase
    """"search" tries a learning rate; "seeds" repeats the best one with another seed."""
    round: int
    """In the search, the number of the optimizer's earlier trials; among the seeds, the seed."""
    optimizer: str
    lr: float
    seed: int


@dataclass(frozen=True)
class Record:
    """The result of one finished trial."""

    phase: Phase
    round: int
    optimizer: str
    lr: float
    seed: int
    status: Status
    metric: float
    """The task's final metric; NaN if the trial diverged (null in the file)."""
    steps: int
    """Steps taken; fewer than planned only if the trial diverged."""
    curve: list[Point]
    """The training loss; each point is the mean since the previous one."""
    validation: list[Point]
    """The task's metric during training, starting with the untrained model."""
    parameters: int
    state_bytes: int
    state_bytes_per_parameter: float
    optimizer_ms: float
    """Median milliseconds of `optimizer.step()` in this trial."""
    step_ms: float
    """Median milliseconds of a training step in this trial."""
    seconds: float
    """Seconds of the whole trial: building, training and evaluating."""
    schedule: str
    hyper: dict[str, Any]
    machine: dict[str, Any]

    @property
    def trial(self) -> TrialSpec:
        """The trial that produced this record."""
        return TrialSpec(self.phase, self.round, self.optimizer, self.lr, self.seed)

    @property
    def finite(self) -> bool:
        """Whether the trial ended with a finite metric."""
        return self.status == "ok" and math.isfinite(self.metric)

    def to_json(self) -> str:
        """Serialize the record as one line of strict JSON (NaN and infinities become null)."""
        return json.dumps(_without_nonfinite(asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Parse a line that `to_json` wrote.

        Raises:
            ValueError: the line is not the JSON of a record.
        """
        data = json.loads(line)
        if not isinstance(data, dict) or set(data) != {field.name for field in fields(cls)}:
            raise ValueError("not a trial record")
        for name in ("curve", "validation"):
            data[name] = [(step, seconds, _nan_if_none(value)) for step, seconds, value in data[name]]
        for name in ("metric", "optimizer_ms", "step_ms"):
            data[name] = _nan_if_none(data[name])
        return cls(**data)


class RecordFile:
    """The records of one race on disk.

    If a crash left the last line incomplete, `read` ignores it and `append` overwrites it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Record]:
        """Return all complete records in the order of writing; none if there is no file.

        Raises:
            LabError: a line that ends in a newline is not a record.
        """
        records = []
        lines = self._whole_lines()
        for number, line in enumerate(lines, start=1):
            try:
                records.append(Record.from_json(line.decode()))
            except ValueError as error:
                raise LabError(
                    f"line {number} of {self.path} is not a trial record; choose another directory or --fresh"
                ) from error
        return records

    def append(self, record: Record) -> None:
        """Append a record and flush it to the disk."""
        whole = sum(len(line) + 1 for line in self._whole_lines())
        with self.path.open("ab") as file:
            file.truncate(whole)
            file.write(record.to_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _whole_lines(self) -> list[bytes]:
        """Return the lines that end in a newline, which is written last."""
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
