"""Three races of all methods: a perceptron and a convolutional net on digits, and a GPT on text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from ..errors import LabError
from ..progress import Watcher
from ..racing import RaceResult, race
from ..standings import winners
from ..task import Task
from ..tasks import digits_task, text_task
from .methods import Thresholds, contestants
from .models import PatchConvNet, normed_mlp
from .watching import Watch, read_watches

TRIALS = 3
"""Learning rates that every method tries."""


@dataclass(frozen=True)
class Study:
    """One race: the task, and what of its plan is fixed."""

    task: Callable[[], Task[Any]]
    steps: int
    seeds: int
    thresholds: Thresholds


@dataclass(frozen=True)
class Result:
    """A race and what was seen of its weights."""

    name: str
    race: RaceResult
    watches: list[Watch]

    def of(self, method: str) -> list[Watch]:
        """What was seen of a method at its tuned learning rate, a trial per seed."""
        tuned = {(r.lr, r.seed) for r in winners(self.race.plan, self.race.records, method)}
        return [w for w in self.watches if w.method == method and (w.lr, w.seed) in tuned]

    def bytes_per_weight(self, method: str) -> float:
        """Persistent bytes of a hidden weight and what trains it, measured."""
        return fmean(w.bytes_per_weight for w in self.of(method))


def _digits(name: str, make: Callable[[], nn.Module]) -> Task[Any]:
    task = digits_task("mlp", batch=64)
    return replace(task, name=name, make=lambda seed: make(), config={**task.config, "model": name})


_SCHEDULE = {"schedule": "annealed", "power": 0.3, "max_flip_fraction": 0.001}
# One setting for all three races, so that none is tuned to its own test data.
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
    watcher: Watcher | None = None,
) -> list[Result]:
    """Run the races that are not on record yet.

    Args:
        out: The folder; every race gets one in it, with plan, records and what was seen of the weights.
        names: Which, of `STUDIES`; by default all.
        steps: Of every trial; by default the study's own.
        trials: Learning rates each method tries; by default `TRIALS`.
        seeds: Seeds of each method's best learning rate; by default the study's own.
        fresh: Begin anew.
        watcher: Told of everything as it happens.

    Raises:
        LabError: no such study, or a folder with another plan.
    """
    results = []
    for name in STUDIES if names is None else names:
        if name not in STUDIES:
            raise LabError(f"no study {name!r}: there are {', '.join(STUDIES)}")
        study = STUDIES[name]
        folder, taken = out / name, study.steps if steps is None else steps
        seen = folder / "flips.jsonl"
        if fresh:
            seen.unlink(missing_ok=True)
        result = race(
            study.task(),
            contestants(study.thresholds, taken, seen),
            trials=TRIALS if trials is None else trials,
            seeds=study.seeds if seeds is None else seeds,
            steps=taken,
            out=folder,
            fresh=fresh,
            report=False,
            watcher=watcher,
        )
        results.append(Result(name, result, read_watches(seen)))
    return results
