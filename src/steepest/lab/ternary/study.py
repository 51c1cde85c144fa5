"""The study: races of all methods with a perceptron and a convolutional net on digits, and a GPT on text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from ..errors import LabError
from ..progress import Callback
from ..racing import RaceResult, race
from ..ranking import tuned_trials
from ..task import Task
from ..tasks import digits_task, text_task
from .methods import Thresholds, method_specs
from .models import PatchConvNet, normed_mlp
from .weight_stats import WeightStats, read_weight_stats

TRIALS = 3
"""Number of learning rates per method."""


@dataclass(frozen=True)
class Study:
    """A task and the fixed settings of its race."""

    task: Callable[[], Task[Any]]
    steps: int
    seeds: int
    thresholds: Thresholds


@dataclass(frozen=True)
class Result:
    """A race and the statistics of its weights."""

    name: str
    race: RaceResult
    weight_stats: list[WeightStats]

    def tuned_stats(self, method: str) -> list[WeightStats]:
        """Return a method's weight statistics at its tuned learning rate, one per seed."""
        tuned = {(r.lr, r.seed) for r in tuned_trials(self.race.plan, self.race.records, method)}
        return [w for w in self.weight_stats if w.method == method and (w.lr, w.seed) in tuned]

    def bytes_per_weight(self, method: str) -> float:
        """Return the measured persistent bytes per hidden weight, including optimizer state."""
        return fmean(w.bytes_per_weight for w in self.tuned_stats(method))


def _digits(name: str, make: Callable[[], nn.Module]) -> Task[Any]:
    task = digits_task("mlp", batch=64)
    return replace(task, name=name, make=lambda seed: make(), config={**task.config, "model": name})


_SCHEDULE = {"schedule": "annealed", "power": 0.3, "max_flip_fraction": 0.001}
# All three races share these settings, so that none is tuned to its own test data.
_THRESHOLDS = Thresholds(sign={"threshold": 24, **_SCHEDULE}, magnitude={"threshold": 32, **_SCHEDULE})

STUDIES = {
    "mlp": Study(lambda: _digits("mlp", normed_mlp), 400, 5, _THRESHOLDS),
    "convnet": Study(lambda: _digits("convnet", PatchConvNet), 400, 5, _THRESHOLDS),
    "text": Study(text_task, 400, 3, _THRESHOLDS),
}


def run_study(
    out: Path,
    names: Iterable[str] | None = None,
    *,
    steps: int | None = None,
    trials: int | None = None,
    seeds: int | None = None,
    fresh: bool = False,
    callback: Callback | None = None,
) -> list[Result]:
    """Run the studies, or resume them.

    Args:
        out: The directory. Every race has a subdirectory with its plan, records and weight statistics.
        names: Names from `STUDIES`; by default all.
        steps: Steps of every trial; by default as in `STUDIES`.
        trials: Number of learning rates per method; by default `TRIALS`.
        seeds: Number of seeds at each method's best learning rate; by default as in `STUDIES`.
        fresh: Start over and delete earlier results.
        callback: Receives progress events.

    Raises:
        LabError: a name is unknown, or a directory holds a race with another plan.
    """
    results = []
    for name in STUDIES if names is None else names:
        if name not in STUDIES:
            raise LabError(f"no study {name!r}: there are {', '.join(STUDIES)}")
        study = STUDIES[name]
        directory, trial_steps = out / name, study.steps if steps is None else steps
        stats_file = directory / "flips.jsonl"
        if fresh:
            stats_file.unlink(missing_ok=True)
        result = race(
            study.task(),
            method_specs(study.thresholds, trial_steps, stats_file),
            trials=TRIALS if trials is None else trials,
            seeds=study.seeds if seeds is None else seeds,
            steps=trial_steps,
            out=directory,
            fresh=fresh,
            report=False,
            callback=callback,
        )
        results.append(Result(name, result, read_weight_stats(stats_file)))
    return results
