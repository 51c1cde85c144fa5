"""What test_resume.py and the new process that it starts have in common: jobs, and ways to save them.

Run as ``python -m contract.resume_jobs FOLDER`` it is the new process: it loads every job's checkpoint
from the folder, goes on, and writes the results there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import steepest

from .cases import CASES, LOW_BIT, LR, RULES, Case, spread
from .training import snapshot, steps

BEFORE, AFTER = range(3), range(3, 6)

KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float64": {},
    "float16": {},
    "bfloat16-stochastic": {"rounding": "stochastic"},
    "bfloat16-float32_state": {"state_dtype": torch.float32},
}


class Net(torch.nn.Module):
    """A model whose names torch.distributed.checkpoint files the state under."""

    def __init__(self, dtype: torch.dtype, cases: Iterable[Case]) -> None:
        super().__init__()
        self.layers = torch.nn.ParameterList(param for case in cases for param in case.params(dtype))


@dataclass(frozen=True)
class Job:
    """A case and a kind of parameter; without a case, all rules in one optimizer."""

    case: Case | None
    kind: str

    def __str__(self) -> str:
        return f"{self.case or 'all_rules_at_once'}-{self.kind}"

    def make(self) -> tuple[Net, steepest.Optimizer]:
        """The untrained model and its optimizer."""
        dtype, options = getattr(torch, self.kind.split("-")[0]), KINDS.get(self.kind, {})
        options = {"weight_decay": 0.125, "nonfinite": "skip", **options}
        if self.case is not None:
            net = Net(dtype, [self.case])
            return net, self.case.make(net.parameters(), **options)
        net = Net(dtype, RULES)
        layers = iter(net.layers)
        groups = [
            {"params": [next(layers) for _ in case.shapes], "rule": case.name, "lr": LR} for case in RULES
        ]
        return net, steepest.Optimizer(groups, rule="adamw", **options)


def result(net: Net, optimizer: steepest.Optimizer) -> dict[str, Any]:
    """Everything that must be equal in the end, what lies outside the state dict too."""
    return snapshot(optimizer, net.parameters())


JOBS = [
    *(Job(*each) for each in spread(CASES, KINDS)),
    *(Job(None, kind) for kind in KINDS),
    *(Job(case, str(dtype).removeprefix("torch.")) for case, dtype in LOW_BIT),
]


def _save_files(folder: Path, trained: dict[str, Any]) -> None:
    for name, (net, optimizer) in trained.items():
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, folder / f"{name}.pt")


def _load_files(folder: Path, fresh: dict[str, Any]) -> None:
    for name, (net, optimizer) in fresh.items():
        saved = torch.load(folder / f"{name}.pt", weights_only=True)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])


def _distributed(flatten: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def tree(jobs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: {
                "net": net.state_dict(),
                "optimizer": get_optimizer_state_dict(net, optimizer, options=options),
            }
            for name, (net, optimizer) in jobs.items()
        }

    def save(folder: Path, trained: dict[str, Any]) -> None:
        writer = dcp.FileSystemWriter(folder / f"dcp{flatten}")
        dcp.save(tree(trained), storage_writer=writer, no_dist=True)

    def load(folder: Path, fresh: dict[str, Any]) -> None:
        loaded = tree(fresh)
        dcp.load(loaded, storage_reader=dcp.FileSystemReader(folder / f"dcp{flatten}"), no_dist=True)
        for name, (net, optimizer) in fresh.items():
            net.load_state_dict(loaded[name]["net"])
            set_optimizer_state_dict(net, optimizer, loaded[name]["optimizer"], options=options)

    return save, load


WAYS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "torch.save": (_save_files, _load_files),
    "dcp": _distributed(flatten=False),
    "dcp_flat": _distributed(flatten=True),
}


def go_on(jobs: Iterable[tuple[Net, steepest.Optimizer]], which: range) -> None:
    """Take these steps with every job."""
    for net, optimizer in jobs:
        steps(optimizer, list(net.parameters()), which)


def _resume(folder: Path) -> None:
    results: dict[str, dict[str, Any]] = {}
    for way, (_, load) in WAYS.items():
        fresh = {str(job): job.make() for job in JOBS}
        try:
            load(folder, fresh)
        except Exception as error:
            results[way] = {"error": f"{type(error).__name__}: {error}"}
            continue
        go_on(fresh.values(), AFTER)
        results[way] = {name: result(*made) for name, made in fresh.items()}
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    _resume(Path(sys.argv[1]))
