"""Records as pandas tables: a row per trial, or per point of its curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pandas as pd

from ..records import Experiment, Record

_COPIED = ["optimizer", "phase", "seed", "steps", "searched", "finished", "parameters", "schedule"]
Point = tuple[int, float, float]


def distinct(records: Iterable[Record]) -> list[Record]:
    """Return the records without duplicates; of two for the same trial, the later one."""
    return list({record.key: record for record in records}.values())


def trials(experiment: Experiment, records: Iterable[Record]) -> pd.DataFrame:
    """Return a row per trial, with its `record`; `validation` and `test` hold the primary metric.

    A diverged trial has NaN in both, and a trial of the search NaN in `test`.
    """
    metric = experiment.metric.name
    rows = [
        (*(getattr(r, name) for name in _COPIED), r.validated(metric), r.tested(metric), r)
        for r in distinct(records)
    ]
    return pd.DataFrame(rows, columns=[*_COPIED, "validation", "test", "record"])


def points(records: Iterable[Record], of: Callable[[Record], Iterable[Point]]) -> pd.DataFrame:
    """Return a row per point (`step`, `seconds`, `value`) that `of` gives for a record, with its trial."""
    rows = [(r.optimizer, r.phase, r.seed, r.steps, r.finished, *point) for r in records for point in of(r)]
    trial = ["optimizer", "phase", "seed", "steps", "finished"]
    return pd.DataFrame(rows, columns=[*trial, "step", "seconds", "value"])
