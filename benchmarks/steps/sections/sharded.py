"""Sharded Muon steps in several processes, and how evenly plans share out the work."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from steepest.model_shapes import model_shapes
from steepest.planning import plan_sharded

from ..config import BenchConfig, log
from ..results import Column, Result, Row, error_line
from ..sharded_job import run_processes

WORLDS = (2, 4)
"""Numbers of processes."""

PLANS = (
    ("gpt2-124m", 2),
    ("gpt2-124m", 4),
    ("llama-1b", 8),
    ("llama-1b", 16),
    ("llama-70b", 8),
    ("llama-70b", 64),
)
"""Models and numbers of processes whose load is planned."""

_COLUMNS = (
    Column("processes", "processes", "count"),
    Column("label", "optimizer"),
    Column("source", "from"),
    Column("step_ms", "step, ms", "ms"),
    Column("times_owners", "× owners", "ratio"),
    Column("times_narrow", "× owners in bfloat16", "ratio"),
    Column("collectives", "collectives", "count"),
    Column("sent_bytes", "sent", "bytes"),
    Column("formula_bytes", "formula", "bytes"),
    Column("temporary_bytes", "temporary", "bytes"),
    Column("planned_bytes", "planned", "bytes"),
    Column("bucket_bytes", "bucket", "bytes"),
    Column("waves", "waves", "count"),
    Column("reason", ""),
)
_LOADS = (
    Column("model", "model"),
    Column("processes", "processes", "count"),
    Column("units", "matrices", "count"),
    Column("per_process", "matrices a process", "ratio"),
    Column("balance", "max/mean load", "ratio"),
    Column("sent_bytes", "sent", "bytes"),
)
_NOTES = (
    "Hidden matrices of GPT-2 blocks, cut by rows over all processes ({backend}). {rounds} interleaved "
    "rounds, in each the time of the slowest process. Everywhere: all processes gather and compute all.",
    "× owners: the median ratio to the row of that name; × owners in bfloat16: to the one whose products are "
    "in bfloat16, as other packages' are. Above 1, ours is faster.",
    "Sent: by a process to others in a step, counted. Formula: 2·N·e·(W−1)/W², everywhere N·e·(W−1)/W. "
    "Temporary: the most of any process. Planned: the estimate by which waves are cut, of the largest wave.",
)


def run(config: BenchConfig) -> Iterator[Result]:
    """Yield a table of steps for each number of processes, then one of planned loads."""
    backend = "gloo" if config.device.type == "cpu" else "nccl"
    notes = [note.format(backend=backend, rounds=config.rounds) for note in _NOTES]
    for world in WORLDS[:1] if config.toy else WORLDS:
        log(f"sharded steps in {world} processes")
        rows = _measure(world, config)
        yield Result("sharded", f"Sharded: Muon in {world} processes", _COLUMNS, rows, notes)
    loads = [load(model, world) for model, world in (PLANS[:2] if config.toy else PLANS)]
    yield Result("sharded", "Sharded: planned loads", _LOADS, loads, ["FSDP2: all matrices cut by rows."])


def _measure(world: int, config: BenchConfig) -> list[Row]:
    devices = torch.accelerator.device_count() if config.device.type != "cpu" else world
    if devices < world:
        return [{"processes": world, "reason": f"needs {world} devices, there are {devices}"}]
    peers = any(not case.ours for group in config.groups for case in group.cases)
    threads = torch.get_num_threads()
    try:
        return run_processes(
            world, config.device, config.rounds, toy=config.toy, peers=peers, threads=threads
        )
    except RuntimeError as error:
        return [{"processes": world, "reason": error_line(error)}]


def load(model: str, world: int) -> Row:
    """Return the planned load of a model's matrices on as many processes."""
    from torch.distributed.tensor import Shard

    shapes = [(tensor.name, tensor.shape) for tensor in model_shapes(model).hidden()]
    found = plan_sharded(shapes, (world,), [Shard(0)])
    return {
        "model": model,
        "processes": world,
        "units": len(found.units),
        "per_process": len(found.units) / world,
        "balance": found.work.balance,
        "sent_bytes": round(found.sent),
    }
