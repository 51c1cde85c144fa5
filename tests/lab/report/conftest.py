from __future__ import annotations

import math
from typing import Any

import pytest

from steepest.lab.records import Cost, Metric, OptimizerEntry, Record
from steepest.lab.report.merge import Section

from ..conftest import make_experiment, make_record

ALL = ("adamw", "lion", "muon", "signgsd")
BYTES = {"adamw": 800, "lion": 400, "muon": 440, "signgsd": 0}
BEST = {"adamw": 2.1, "lion": 2.0, "muon": 1.9, "signgsd": 2.6}
LRS, DECAYS = (1e-4, 3e-4, 1e-3, 1e-2), (0.0, 0.1)


def make_section(**changes: Any) -> Section:
    """A finished sweep: muon is the best, and signgsd diverges at the largest lr."""
    records: list[Record] = []
    for name in ALL:
        for at, lr in enumerate(LRS):
            for decay in DECAYS:
                value = BEST[name] + abs(at - 1) ** 2 * 0.1 + decay
                if lr == 1e-2:
                    value = {"signgsd": math.nan, "lion": 60.0}.get(name, value)
                records.append(
                    make_record(
                        name, value, searched={"lr": lr, "weight_decay": decay}, state_bytes=BYTES[name]
                    )
                )
        for seed in (1, 2, 3):
            chosen = {"lr": 3e-4, "weight_decay": 0.0}
            value = BEST[name] + seed / 1000
            gains = {f"gain/layer{n}": [(0, 1.0), (500, 2.0 + n)] for n in range(2)}
            common: dict[str, Any] = {"seed": seed, "state_bytes": BYTES[name]}
            records.append(make_record(name, value, phase="tuned", searched=chosen, series=gains, **common))
            records.append(make_record(name, value + 0.1, phase="default", **common))
    costs = {
        name: Cost(
            optimizer=name, model="m", parameters=100, state_bytes=8, optimizer_ms=1.5, gradient_ms=8.5
        )
        for name in ALL
    }
    entry = OptimizerEntry(
        entry="it",
        hyperparameters={"lr": 1e-3, "weight_decay": 0.0},
        space={"lr": [*LRS], "weight_decay": [*DECAYS]},
    )
    experiment = make_experiment(ALL, kind="sweep", trials=8, costs=costs)
    changes = {"optimizers": dict.fromkeys(ALL, entry), **changes}
    return Section(experiment.model_copy(update=changes), records, ["the command"])


@pytest.fixture(scope="session")
def section() -> Section:
    return make_section()


__all__ = ["Metric", "make_section"]
