"""Several processes that do one job, as forks of one that has imported torch: importing takes seconds."""

from __future__ import annotations

import multiprocessing
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

__all__ = ["Fork", "run_processes", "saved"]

_SERVER = multiprocessing.get_context("forkserver")
# What the jobs import, but for themselves. The server starts with the first job, and serves all that follow.
_SERVER.set_forkserver_preload(
    [
        "steepest.lab.experiments.race",
        "steepest.optimizer",
        "steepest.routing.build",
        "steepest.ternary",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.optim",
        "torch.distributed.tensor.debug",
        "torch.distributed.tensor.parallel",
    ]
)


def run_processes(job: str, world: int, folder: Path) -> list[dict[str, Any]]:
    """Call a module's ``main(rank, world, folder)`` in several processes; return what each has saved."""
    ranks = [_SERVER.Process(target=_work, args=(job, rank, world, str(folder))) for rank in range(world)]
    try:
        for each in ranks:
            each.start()
        for each in ranks:
            each.join(240)
        assert [each.exitcode for each in ranks] == [0] * world
    finally:
        for each in ranks:
            if each.pid is not None:
                each.kill()
    return saved(folder, world)


class Fork:
    """A process that calls a module's ``serve(connection)``, with the other end of the connection."""

    def __init__(self, job: str) -> None:
        self.connection, theirs = _SERVER.Pipe()
        self.process = _SERVER.Process(target=_serve, args=(job, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.join(60)


def saved(folder: Path, world: int) -> list[dict[str, Any]]:
    """Return what each process has saved in the folder."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _work(job: str, rank: int, world: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import_module(job).main(rank, world, folder)


def _serve(job: str, connection: Any) -> None:
    torch.set_num_threads(1)
    import_module(job).serve(connection)
