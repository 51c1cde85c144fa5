"""The plan of a race, fixed before its first trial and saved next to its records."""

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
    """Median times per step, measured while all optimizers take turns on the same model."""

    rounds: int
    gradient_ms: float
    """Milliseconds of a forward and a backward pass."""
    optimizer_ms: dict[str, float]
    """Milliseconds of `optimizer.step()`, by label."""
    optimizer_ms_quartiles: dict[str, tuple[float, float]]
    """First and third quartiles of the same times, which show the machine's noise."""
    evaluation_seconds: float
    """Seconds of one evaluation of the metric."""

    @property
    def step_seconds(self) -> float:
        """Seconds of a training step, averaged over the optimizers."""
        return (self.gradient_ms + fmean(self.optimizer_ms.values())) / 1e3

    def less_noisy(self, other: StepTimes) -> StepTimes:
        """Return the measurement with the faster gradient, which is the same work in both."""
        return self if self.gradient_ms <= other.gradient_ms else other


@dataclass(frozen=True)
class Request:
    """The user's request. A directory holds the trials of one request only."""

    task: str
    metric: str
    unit: str
    lower_is_better: bool
    config: dict[str, Any]
    parameters: int
    device: str
    threads: int | None
    """Torch's CPU threads, which affect rounding as well as times; None if the model is not on the CPU."""
    optimizers: dict[str, dict[str, Any]]
    """Hyper-parameters by label, including the default lr, in the order of the race."""
    trials: int
    seeds: int
    evaluations: int
    steps: int | None
    budget: float | None

    def differences(self, other: Request) -> list[str]:
        """List the differences, each as "name (old there, new asked)"."""
        return _differences("", asdict(self), asdict(other))


@dataclass(frozen=True)
class Plan:
    """A request and the decisions made before its first trial."""

    request: Request
    steps: int
    """Steps of every trial."""
    schedule: str
    limit: float | None
    """Seconds by which every optional round must end; None without a budget."""
    setup_seconds: float
    """Seconds spent before the first trial."""
    times: StepTimes
    """The less noisy of two measurements, before the first trial and after the last."""
    machine: dict[str, Any]

    @property
    def labels(self) -> list[str]:
        """The optimizers' labels in the order of the race."""
        return list(self.request.optimizers)

    @property
    def max_trials(self) -> int:
        """Number of trials if no round is dropped."""
        return len(self.labels) * (self.request.trials + self.request.seeds - 1)

    def score(self, metric: float) -> float:
        """Return the metric with its sign chosen so that lower is better."""
        return metric if self.request.lower_is_better else -metric

    def save(self, path: Path) -> None:
        """Write the plan as JSON atomically."""
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> Plan | None:
        """Read a saved plan; return None if there is no file.

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
                f"{path} is not a plan that this version can read; choose another directory or --fresh"
            ) from error

    def require_same_request(self, request: Request, directory: Path) -> None:
        """Check that a resumed race has the saved plan's request.

        Raises:
            LabError: the requests differ; the message lists the differences.
        """
        # The saved request went through JSON, which turns tuples into lists, so the new one must too.
        asked = Request(**json.loads(json.dumps(asdict(request))))
        differing = self.request.differences(asked)
        if differing:
            raise LabError(
                f"{directory} holds a race with another plan: {'; '.join(differing)}; "
                "choose another directory or --fresh"
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


def require_json(name: str, value: Any) -> None:
    """Check that a value survives a round trip through JSON, so that it can be compared with a saved plan.

    Raises:
        LabError: a value does not; the message names the first one.
    """
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        for key, item in value.items():
            require_json(f"{name}[{key!r}]", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            require_json(f"{name}[{index}]", item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise LabError(f"{name} is {value}: a resumed race could not compare it with the saved plan")
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise LabError(
            f"the task's {name} is a {type(value).__name__}: give plain JSON values "
            "(numbers, strings, lists, dicts with string keys), such as a size or a fingerprint"
        )


def _short(value: Any) -> str:
    return "none" if value is None else str(value)
