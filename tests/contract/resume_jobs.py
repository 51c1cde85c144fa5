"""What test_resume.py and the new process that it starts have in common: jobs, and ways to save them.

``main`` is the new process: it loads every job's checkpoint from the folder, goes on, and saves the results.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
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
from .training import make_params, snapshot, steps

KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float64": {},
    "float16": {},
    "float16-stochastic": {"rounding": "stochastic"},
    "bfloat16": {},
    # torch would load this state as bfloat16.
    "bfloat16-stochastic": {"rounding": "stochastic", "state_dtype": torch.float32},
}
FILED = ("float32", "bfloat16-stochastic")


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
    compile: bool = False
    before: int = 3
    """The number of steps before saving. Two follow."""

    def __str__(self) -> str:
        named = f"{self.case or 'all_rules_at_once'}-{self.kind}"
        return f"{named}-{'compiled' if self.compile else f'after_{self.before}'}"

    def __hash__(self) -> int:
        return hash(str(self))

    def make(self) -> tuple[Net, steepest.Optimizer]:
        """The untrained model and its optimizer."""
        dtype, options = getattr(torch, self.kind.split("-")[0]), KINDS.get(self.kind, {})
        options = {"weight_decay": 0.125, "nonfinite": "skip", "compile": self.compile, **options}
        if self.compile and self.case is not None:
            net = Net(dtype, [])
            net.layers = torch.nn.ParameterList(make_params(dtype, shapes=[(4, 3)]))  # one graph
            return net, self.case.make(net.parameters(), **options)
        if self.case is not None:
            net = Net(dtype, [self.case])
            return net, self.case.make(net.parameters(), **options)
        net = Net(dtype, RULES)
        layers = iter(net.layers)
        groups = [
            {"params": [next(layers) for _ in case.shapes], "rule": case.name, "lr": LR} for case in RULES
        ]
        return net, steepest.Optimizer(groups, rule="adamw", **options)

    def go_on(self, net: Net, optimizer: steepest.Optimizer) -> None:
        """Take the steps after saving."""
        steps(optimizer, list(net.parameters()), range(self.before, self.before + 2))


Made = Mapping[Job, tuple[Net, steepest.Optimizer]]


def result(net: Net, optimizer: steepest.Optimizer) -> dict[str, Any]:
    """Everything that must be equal in the end, what lies outside the state dict too."""
    return snapshot(optimizer, net.parameters())


_OTHERS = [
    *(Job(None, kind) for kind in KINDS),
    *(Job(case, str(dtype).removeprefix("torch.")) for case, dtype in LOW_BIT),
]
# A state dict is turned into something else and back whatever the rule: the first rule of all whose state is
# alike goes with every kind of parameter, and every other case with one, each another. Through a file every
# case goes with state of its parameter's dtype and with state of another, too.
SPREAD = [*(Job(*each) for each in spread(CASES, KINDS)), *_OTHERS]
EVERY = [*dict.fromkeys([*(Job(case, kind) for case in CASES for kind in FILED), *SPREAD])]
# Before the first step the state is what torch.distributed.checkpoint makes exist, whatever it would become.
UNTRAINED = [Job(*each, before=0) for each in spread(CASES, KINDS, alike=lambda case: "")]
# test_compiled.py shows that a compiled step has the bits of an eager one, and what follows from that is
# above. These are the compiled passes there are: elements, sums over a tensor, matrices, noise. The run that
# never stops is eager, so that only the new process compiles.
COMPILED = [
    Job(Case("lion"), "bfloat16-stochastic", compile=True),
    Job(Case("sgd_sai"), "float32", compile=True),
    Job(Case("muon"), "float32", compile=True),
]


def _save_files(path: Path, trained: Made) -> None:
    saved = {
        str(job): {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
        for job, (net, optimizer) in trained.items()
    }
    torch.save(saved, path)


def _load_files(path: Path, fresh: Made) -> None:
    saved = torch.load(path, weights_only=True)
    for job, (net, optimizer) in fresh.items():
        net.load_state_dict(saved[str(job)]["net"])
        optimizer.load_state_dict(saved[str(job)]["optimizer"])


def _save_flat(path: Path, trained: Made) -> None:
    saved = {}
    for job, (net, optimizer) in trained.items():
        tensors, metadata = steepest.flatten_state_dict(optimizer.state_dict())
        assert {type(value) for value in metadata.values()} == {str}
        saved[str(job)] = {"net": net.state_dict(), "tensors": tensors, "metadata": metadata}
    torch.save(saved, path)


def _load_flat(path: Path, fresh: Made) -> None:
    saved = torch.load(path, weights_only=True)
    for job, (net, optimizer) in fresh.items():
        own = saved[str(job)]
        net.load_state_dict(own["net"])
        optimizer.load_state_dict(steepest.unflatten_state_dict(own["tensors"], own["metadata"]))


def _save_checkpoints(path: Path, trained: Made) -> None:
    path.mkdir()
    for index, (net, optimizer) in enumerate(trained.values()):
        steepest.save_checkpoint(path / f"{index}.pt", model=net, optimizer=optimizer)


def _load_checkpoints(path: Path, fresh: Made) -> None:
    for index, (net, optimizer) in enumerate(fresh.values()):
        steepest.load_checkpoint(path / f"{index}.pt", model=net, optimizer=optimizer)


def _distributed(flatten: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def tree(jobs: Made) -> dict[str, Any]:
        return {
            str(job): {
                "net": net.state_dict(),
                "optimizer": get_optimizer_state_dict(net, optimizer, options=options),
            }
            for job, (net, optimizer) in jobs.items()
        }

    def save(path: Path, trained: Made) -> None:
        dcp.save(tree(trained), storage_writer=dcp.FileSystemWriter(path), no_dist=True)

    def load(path: Path, fresh: Made) -> None:
        loaded = tree(fresh)
        dcp.load(loaded, storage_reader=dcp.FileSystemReader(path), no_dist=True)
        for job, (net, optimizer) in fresh.items():
            net.load_state_dict(loaded[str(job)]["net"])
            set_optimizer_state_dict(net, optimizer, loaded[str(job)]["optimizer"], options=options)

    return save, load


Way = tuple[Callable[[Path, Made], None], Callable[[Path, Made], None], list[Job]]
WAYS: dict[str, Way] = {
    "torch.save": (_save_files, _load_files, [*EVERY, *UNTRAINED, *COMPILED]),
    "flat": (_save_flat, _load_flat, [*SPREAD, *UNTRAINED]),
    "save_checkpoint": (_save_checkpoints, _load_checkpoints, [Job(None, kind) for kind in KINDS]),
    "dcp": (*_distributed(flatten=False), [*SPREAD, *UNTRAINED]),
    "dcp_flat": (*_distributed(flatten=True), [*SPREAD, *UNTRAINED]),
}


def main(rank: int, world: int, folder: str) -> None:
    """Resume every job in a process that has trained nothing."""
    warnings.simplefilter("error", RuntimeWarning)  # a compilation that is given up
    results: dict[str, dict[str, Any]] = {}
    for way, (_, load, jobs) in WAYS.items():
        fresh = {job: job.make() for job in jobs}
        try:
            load(Path(folder) / way, fresh)
        except Exception as error:
            results[way] = {"error": f"{type(error).__name__}: {error}"}
            continue
        for job, made in fresh.items():
            job.go_on(*made)
        results[way] = {str(job): result(*made) for job, made in fresh.items()}
    torch.save(results, Path(folder) / f"{rank}.pt")
