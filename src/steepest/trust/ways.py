"""The ways in which :func:`steepest.certify` saves a run and loads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from steepest.trust.checkpoint import generator_states, load_checkpoint, save_checkpoint, set_generators
from steepest.trust.training import Run

__all__ = ["WAYS", "OwnWay", "Way", "load", "save"]

OwnWay = tuple[Callable[[Path, torch.nn.Module, Any], Any], Callable[[Path, torch.nn.Module, Any], Any]]
Way = str | OwnWay
WAYS = ("torch.save", "dcp", "dcp_flat")


def save(way: Way, path: Path, run: Run) -> None:
    """Save a run; the user's functions get the model and what ``make_optimizer`` returned."""
    if not isinstance(way, str):
        way[0](path, run.model, run.made)
    elif way == "torch.save":
        extra = {} if run.scheduler is None else {"scheduler": run.scheduler}
        save_checkpoint(path, model=run.model, optimizer=run.optimizer, extra=extra)
    else:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save as save_shards

        path.mkdir()
        torch.save(generator_states(), path / "generators.pt")
        save_shards(_tree(run, way), storage_writer=FileSystemWriter(path / "shards"), no_dist=True)


def load(way: Way, path: Path, run: Run) -> None:
    """Load what :func:`save` wrote into a run that has not begun."""
    if not isinstance(way, str):
        way[1](path, run.model, run.made)
    elif way == "torch.save":
        extra = {} if run.scheduler is None else {"scheduler": run.scheduler}
        load_checkpoint(path, model=run.model, optimizer=run.optimizer, extra=extra)
    else:
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load as load_shards

        tree = _tree(run, way)
        load_shards(tree, storage_reader=FileSystemReader(path / "shards"), no_dist=True)
        run.model.load_state_dict(tree["model"])
        options = _options(way)
        set_optimizer_state_dict(run.model, run.optimizer, tree["optimizer"], options=options)
        if run.scheduler is not None:
            run.scheduler.load_state_dict(tree["scheduler"])
        set_generators(torch.load(path / "generators.pt", weights_only=True))


def _options(way: str) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(flatten_optimizer_state_dict=way == "dcp_flat")


def _tree(run: Run, way: str) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    tree: dict[str, Any] = {
        "model": run.model.state_dict(),
        "optimizer": get_optimizer_state_dict(run.model, run.optimizer, options=_options(way)),
    }
    if run.scheduler is not None:
        tree["scheduler"] = run.scheduler.state_dict()
    return tree
