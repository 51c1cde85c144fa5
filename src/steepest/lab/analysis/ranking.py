"""The ranking: a row per optimizer, best first, with tests over the seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from ..records import Cost, Experiment, Range, Record
from . import frame
from .target import mean_curve, steps_to_target
from .welch import SIGNIFICANT, welch

GOOD = 0.01
"""A cell of a search belongs to the good region if its metric is within this fraction of the best."""

Edge = Literal["lowest", "highest"]


@dataclass(frozen=True)
class Estimate:
    """A metric over seeds.

    Example:
        >>> estimate = Estimate((1.0, 2.0, 3.0, float("nan")))
        >>> estimate.mean, estimate.std, estimate.seeds, estimate.diverged
        (2.0, 1.0, 4, 1)
    """

    values: tuple[float, ...] = ()
    """A value per seed; NaN if the trial diverged."""

    @property
    def finite(self) -> list[float]:
        """The values of the seeds that did not diverge."""
        return [value for value in self.values if math.isfinite(value)]

    @property
    def mean(self) -> float:
        """Mean over the seeds that did not diverge; NaN without any."""
        return float(np.mean(self.finite)) if self.finite else math.nan

    @property
    def std(self) -> float:
        """Sample standard deviation over the seeds that did not diverge; NaN for fewer than two."""
        return float(np.std(self.finite, ddof=1)) if len(self.finite) > 1 else math.nan

    @property
    def seeds(self) -> int:
        """Number of seeds, diverged ones included."""
        return len(self.values)

    @property
    def diverged(self) -> int:
        """Number of seeds that diverged."""
        return self.seeds - len(self.finite)


@dataclass
class Row:
    """One optimizer's results."""

    optimizer: str
    test: Estimate
    """The primary metric on test data, with the final seeds in phase `tuned`."""
    untuned: Estimate
    """The same with the optimizer's own defaults."""
    others: dict[str, Estimate]
    """The other metrics on test data."""
    best: dict[str, float]
    """The searched hyper-parameters' best values; empty if every trial of the search diverged."""
    edges: dict[str, Edge]
    """Which of them lie at an edge of what was tried, so that a better one may lie beyond it."""
    trials: int
    diverged_trials: int
    state_bytes: float
    """Bytes of state per parameter."""
    cost: Cost | None
    step_ratio: float
    """Milliseconds of `optimizer.step()` divided by the baseline's."""
    steps_to_target: float
    """Steps after which the mean validation curve reaches the baseline's final value; NaN if never."""
    seconds_to_target: float
    """These steps times the timed milliseconds of a training step."""
    decayed: Estimate
    """The metric on test data when the schedule ends at `decayed_steps`."""
    decayed_steps: int
    decayed_reaches: bool
    """Whether that shorter run's mean on validation data reaches the target."""
    cells: int
    """Number of different settings that the search tried."""
    good_cells: int
    """How many of them are within 1 % of the best: the width of the good region."""
    p: float = math.nan
    """P-value of Welch's test against the first row; NaN for the first and where no test is possible."""
    tie: bool = False
    """Whether it cannot be told from the first row, or if it is the first, any other from it."""
    wins: bool = False
    """Whether it is the first row and differs from all others."""


def rank(experiment: Experiment, records: Sequence[Record]) -> list[Row]:
    """Return a row for every optimizer with a record, best first.

    Optimizers whose final trials all diverged come last, and fewer diverged seeds win over a better metric.
    """
    trials = frame.trials(experiment, records)
    goal = target(experiment, trials)
    names = [name for name in experiment.optimizers if name in set(trials["optimizer"])]
    rows = [_row(experiment, trials[trials["optimizer"] == name], goal, name) for name in names]
    score = experiment.metric.score
    rows.sort(key=lambda row: (math.isnan(row.test.mean), row.test.diverged, score(row.test.mean)))
    if rows and rows[0].test.finite:
        first, others = rows[0], [row for row in rows[1:] if row.test.values]
        for row in others:
            row.p = welch(first.test.finite, row.test.finite)
            # An optimizer of which every seed diverged needs no test.
            row.tie = bool(row.test.finite) and not row.p < SIGNIFICANT
        first.tie = any(row.tie for row in others)
        first.wins = bool(others) and not first.tie
    return rows


def tuned(experiment: Experiment, trials: pd.DataFrame, phase: str = "tuned") -> pd.DataFrame:
    """Return the trials of a final phase at the experiment's number of steps (else at the longest)."""
    found = trials[trials["phase"] == phase]
    steps = experiment.steps if experiment.steps in set(found["steps"]) else found["steps"].max()
    return found[found["steps"] == steps]


def target(experiment: Experiment, trials: pd.DataFrame) -> float:
    """Return the baseline's mean final score on validation data; NaN without one."""
    final = tuned(experiment, trials[trials["optimizer"] == experiment.baseline])
    points = mean_curve(final["record"], experiment.metric)
    return points[-1][1] if points else math.nan


def cells(trials: pd.DataFrame) -> pd.DataFrame:
    """Return a row per setting that one optimizer's search tried, with `validation` and `diverged`."""
    settings = pd.DataFrame(list(trials["searched"]), index=trials.index)
    table = settings.assign(validation=trials["validation"], diverged=~trials["finished"].astype(bool))
    if settings.empty:
        return table
    return table.groupby([*settings], dropna=False, as_index=False).agg(
        {"validation": lambda v: v.mean(skipna=False), "diverged": "any"}
    )


def good_region(experiment: Experiment, table: pd.DataFrame) -> pd.Series[bool]:
    """Return which of the `cells` are within 1 % of the best."""
    scores = table["validation"].map(experiment.metric.score)
    return scores - scores.min() <= GOOD * abs(scores.min())


def edges(
    best: Mapping[str, float], tried: pd.DataFrame, space: Mapping[str, Range | list[float]]
) -> dict[str, Edge]:
    """Return which best values are the lowest or the highest of those tried, or lie at their range's bound.

    A lowest value of 0 is no edge, as nothing lies beyond it. A value that was not varied has no edges.
    """
    found: dict[str, Edge] = {}
    for name, value in best.items():
        values = tried[name].dropna() if name in tried else pd.Series(dtype=float)
        if values.nunique() < 2:
            continue
        each = space.get(name) or [*values]
        bounds = [each.low, each.high] if isinstance(each, Range) else each
        # A sampler rarely proposes the bound itself: 2 % beside it is at it.
        if value >= min(values.max(), max(bounds) / 1.02):
            found[name] = "highest"
        elif 0 < value <= max(values.min(), min(bounds) * 1.02):
            found[name] = "lowest"
    return found


def cost_of(experiment: Experiment, optimizer: str | None, parameters: int | None = None) -> Cost | None:
    """Return what an optimizer's step costs, if possible on the model of this size."""
    own = [cost for cost in experiment.costs.values() if cost.optimizer == optimizer]
    return next((cost for cost in own if cost.parameters == parameters), own[0] if own else None)


def _row(experiment: Experiment, own: pd.DataFrame, goal: float, name: str) -> Row:
    metric = experiment.metric
    final, default, short = (
        tuned(experiment, own, phase).sort_values("seed") for phase in ("tuned", "default", "decayed")
    )
    search = own[own["phase"] == "search"]
    table = cells(search)
    chosen = final["record"].iloc[0] if len(final) else experiment.best(search["record"])
    best = {} if chosen is None else chosen.searched
    # A trial that diverged at once may not have created its state.
    state = max(record.state_bytes / record.parameters for record in own["record"])
    cost = cost_of(experiment, name, int(own["parameters"].iloc[0]))
    base = cost_of(experiment, experiment.baseline)
    own_ms, base_ms = ((each and each.optimizer_ms) or math.nan for each in (cost, base))
    steps = steps_to_target(mean_curve(final["record"], metric), goal)
    reached = metric.score(float(short["validation"].mean())) <= goal
    return Row(
        optimizer=name,
        test=Estimate(tuple(final["test"])),
        untuned=Estimate(tuple(default["test"])),
        others={
            m.name: Estimate(tuple(record.tested(m.name) for record in final["record"]))
            for m in experiment.metrics[1:]
        },
        best=best,
        edges=edges(best, table, experiment.optimizers[name].space),
        trials=len(search),
        diverged_trials=int((~search["finished"].astype(bool)).sum()),
        state_bytes=state,
        cost=cost,
        step_ratio=own_ms / base_ms,
        steps_to_target=math.nan if steps is None else steps,
        seconds_to_target=math.nan if steps is None else steps * cost.step_ms / 1000 if cost else math.nan,
        decayed=Estimate(tuple(short["test"])),
        decayed_steps=int(short["steps"].max()) if len(short) else 0,
        decayed_reaches=bool(reached) and len(short) > 0,
        cells=len(table),
        good_cells=int(good_region(experiment, table).sum()),
    )
