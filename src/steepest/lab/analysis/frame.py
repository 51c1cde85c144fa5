"""Records as pandas tables: a row per trial, per training loss and per evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pandas as pd

from ..records import Experiment, Record

_COPIED = ["optimizer", "phase", "seed", "steps", "searched", "finished", "parameters", "schedule"]


def distinct(records: Iterable[Record]) -> list[Record]:
    """Return the records without duplicates; of two for the same trial, the later one."""
    return list({record.key: record for record in records}.values())


def trials(experiment: Experiment, records: Iterable[Record]) -> pd.DataFrame:
    """Return a row per trial, with its `record`; `validation` and `test` hold the primary metric.

    A diverged trial has NaN in both, and a trial of the search NaN in `test`.
    """
    metric = experiment.metric.name
    rows = [
        [
            *(getattr(r, name) for name in _COPIED),
            r.validated(metric),
            (r.test or {}).get(metric, math.nan),
            r,
        ]
        for r in distinct(records)
    ]
    return pd.DataFrame(rows, columns=[*_COPIED, "validation", "test", "record"])


def evaluations(records: Iterable[Record], metric: str) -> pd.DataFrame:
    """Return a row per evaluation on validation data: its trial, `step`, `seconds` and `value`."""
    return _points((r, e.step, e.seconds, e.metrics[metric]) for r in distinct(records) for e in r.validation)


def losses(records: Iterable[Record]) -> pd.DataFrame:
    """Return a row per training loss: its trial, `step`, `seconds` and `value`."""
    return _points((r, *point) for r in distinct(records) for point in r.training_loss)


def series(records: Iterable[Record]) -> pd.DataFrame:
    """Return a row per point of `Record.series`: its trial, the series' `name`, `step` and `value`."""
    frames = [
        _points((r, step, math.nan, value) for step, value in points).assign(name=name)
        for r in distinct(records)
        for name, points in r.series.items()
    ]
    return pd.concat(frames, ignore_index=True) if frames else _points(()).assign(name="")


def _points(points: Iterable[tuple[Record, int, float, float]]) -> pd.DataFrame:
    rows = [
        (r.optimizer, r.phase, r.seed, r.steps, r.finished, step, seconds, value)
        for r, step, seconds, value in points
    ]
    columns = ["optimizer", "phase", "seed", "steps", "finished", "step", "seconds", "value"]
    return pd.DataFrame(rows, columns=columns)
