"""What a race is going to do, fixed before its first trial and kept beside its records."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from .errors import LabError


@dataclass(frozen=True)
class StepTimes:
    """Median times per step, all optimizers taking turns on the same model."""

    rounds: int
    gradient_ms: float
    """Milliseconds of a forward and a backward pass."""
    optimizer_ms: dict[str, float]
    """Milliseconds of `optimizer.step()`, by label."""
    optimizer_ms_quartiles: dict[str, tuple[float, float]]
    """The quartiles of the same: how much the machine swung."""
    evaluation_seconds: float
    """Seconds of one evaluation of the metric."""

    @property
    def step_seconds(self) -> float:
        """Seconds of a whole step, mean over the optimizers."""
        return (self.gradient_ms + fmean(self.optimizer_ms.values())) / 1e3

    def calmer(self, other: StepTimes) -> StepTimes:
        """Whichever was measured on the less disturbed machine: the gradient's work was the same."""
        return self if self.gradient_ms <= other.gradient_ms else other


@dataclass(frozen=True)
class Request:
    """What was asked for. A folder holds the trials of one request only."""

    task: str
    metric: str
    unit: str
    lower_is_better: bool
    config: dict[str, Any]
    parameters: int
    device: str
    threads: int | None
    """Torch's CPU threads, which change rounding as well as times; None when the model is elsewhere."""
    optimizers: dict[str, dict[str, Any]]
    """Label to hyper-parameters, the default lr among them, in the order of the race."""
    trials: int
    seeds: int
    evaluations: int
    steps: int | None
    budget: float | None

    def differences(self, other: Request) -> list[str]:
        """What differs, each as "name (here, there)"."""
        return _differences("", asdict(self), asdict(other))


@dataclass(frozen=True)
class Plan:
    """A request and what was settled at its start."""

    request: Request
    steps: int
    """Steps of every trial."""
    schedule: str
    limit: float | None
    """Seconds after which no optional round begins; None without a budget."""
    setup_seconds: float
    """Seconds spent before the first trial."""
    times: StepTimes
    """Measured before the first trial and after the last; the calmer of the two."""
    machine: dict[str, Any]

    @property
    def labels(self) -> list[str]:
        """The optimizers, in the order of the race."""
        return list(self.request.optimizers)

    @property
    def most_trials(self) -> int:
        """Trials of the whole race if no round is dropped."""
        return len(self.labels) * (self.request.trials + self.request.seeds - 1)

    def score(self, metric: float) -> float:
        """The metric turned so that lower is better."""
        return metric if self.request.lower_is_better else -metric

    def save(self, path: Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> Plan | None:
        """Read a saved plan; None if there is none.

        Raises:
            LabError: the file is not a plan of this version.
        """
        if not path.exists():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if set(data) != {field.name for field in fields(cls)}:
                raise ValueError("not a plan")
            data["request"] = Request(**data["request"])
            data["times"] = StepTimes(**data["times"])
            return cls(**data)
        except (ValueError, TypeError) as error:
            raise LabError(
                f"{path} is not a plan this version can read; choose another folder or --fresh"
            ) from error

    def check_same(self, request: Request, folder: Path) -> None:
        """Refuse to go on under another request.

        Raises:
            LabError: naming what differs.
        """
        # A round trip through JSON, because the saved one has been through it (tuples are lists).
        asked = Request(**json.loads(json.dumps(asdict(request))))
        differing = self.request.differences(asked)
        if differing:
            raise LabError(
                f"{folder} holds a race of another plan: {'; '.join(differing)}; "
                "choose another folder or --fresh"
            )


def _differences(prefix: str, here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    found = []
    for name in dict.fromkeys([*here, *there]):
        a, b = here.get(name), there.get(name)
        if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
            found += _differences(f"{prefix}{name}.", a, b)
        elif isinstance(a, dict) and isinstance(b, dict):
            found.append(f"{prefix}{name} ({', '.join(a)} there, {', '.join(b)} asked)")
        elif a != b:
            found.append(f"{prefix}{name} ({_short(a)} there, {_short(b)} asked)")
    return found


def require_plain(name: str, value: Any) -> None:
    """Refuse what JSON would not give back: it could not be compared with a saved plan.

    Raises:
        LabError: naming the first such value.
    """
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        for key, item in value.items():
            require_plain(f"{name}[{key!r}]", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            require_plain(f"{name}[{index}]", item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise LabError(f"{name} is {value}, which equals nothing: a resumed race could not compare it")
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise LabError(
            f"the task's {name} is a {type(value).__name__}: give plain JSON values "
            "(numbers, text, lists, dicts with text as keys), such as a size or a fingerprint"
        )


def _short(value: Any) -> str:
    return "none" if value is None else str(value)
