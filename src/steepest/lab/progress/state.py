"""What a display needs to know about a running experiment: trials done, and the ETA."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import fmean

from ..records import Experiment, Record


class State:
    """Counts an experiment's trials, from the records that were already there."""

    def __init__(self, experiment: Experiment, records: Sequence[Record]) -> None:
        self.experiment = experiment
        self.records = list(records)
        self._already = len(self.records)
        self._begin = time.monotonic()

    @property
    def total(self) -> int:
        """Trials of the whole experiment; `decayed` ones count once their number of steps is known."""
        experiment = self.experiment
        searched = sum(bool(entry.space) for entry in experiment.optimizers.values())
        finals = len(experiment.seeds) * (searched + len(experiment.optimizers))
        decayed = {record.optimizer for record in self.records if record.phase == "decayed"}
        return experiment.trials * searched + finals + len(decayed) * len(experiment.seeds)

    def remaining_seconds(self, done: float = 0.0) -> float:
        """Estimate the time for the rest from the pace so far, that of all workers together.

        `done` is the fraction of the running trial that is over.
        """
        finished = len(self.records) - self._already
        if finished:
            per_trial = (time.monotonic() - self._begin) / (finished + done)
        else:
            costs = [cost.step_ms for cost in self.experiment.costs.values()]
            per_trial = self.experiment.steps * fmean(costs or [0]) / 1e3
        return max(0.0, self.total - len(self.records) - done) * per_trial

    def best(self, label: str) -> Record | None:
        """Return the optimizer's best search trial so far."""
        search = [r for r in self.records if r.optimizer == label and r.phase == "search"]
        return self.experiment.best(search)


def outcome(experiment: Experiment, record: Record) -> str:
    """Describe a trial's result in a few words.

    Final trials show the metric on test data, search trials on validation data.
    """
    if not record.finished:
        return f"diverged at step {record.last_step}"
    name = experiment.metric.name
    value = record.validated(name) if record.test is None else record.test[name]
    return f"{name} {value:.4g}{experiment.metric.unit and ' ' + experiment.metric.unit}"


def settings(values: Mapping[str, float]) -> str:
    """Format searched hyper-parameters.

    Example:
        >>> settings({"lr": 0.0012345, "weight_decay": 0.1})
        'lr 0.00123, weight_decay 0.1'
    """
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items()) or "defaults"
