"""Time sharded Muon steps in several processes: ours, all-gather and compute, and other packages'.

Run as a module, this file is one of the processes: the first one prints its rows as one line of JSON.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import steepest
from steepest.lab.training.clock import now
from steepest.lab.training.timing import Timing
from steepest.model_shapes import ParamShape, gpt2_blocks
from steepest.planning import plan_sharded

from .case import LR, WEIGHT_DECAY, Params
from .profiling import profile_step
from .results import Row, error_line

OWNERS, NARROW_NS = "owners", "owners, products in bfloat16"
"""The labels with which others are compared."""

ROOT = Path(__file__).parents[2]
_WARMUP_ROUNDS = 2
_TIMEOUT = 900
_SMALL_BUCKET, _TOY_BUCKET = 1 << 20, 1 << 14
_COMMON: dict[str, Any] = {"lr": LR, "weight_decay": WEIGHT_DECAY}


@dataclass(frozen=True)
class ShardedCase:
    """An optimizer of sharded parameters.

    Args:
        label: name in the tables.
        source: package.
        make: constructs it for parameters on a mesh.
        options: of ours.
        compiled: whether it compiles its step, into which the counter of collectives cannot look.
    """

    label: str
    source: str
    make: Callable[[Params, DeviceMesh], torch.optim.Optimizer]
    options: dict[str, Any] | None = None
    compiled: bool = False


def _ours(label: str, **options: Any) -> ShardedCase:
    def make(params: Params, mesh: DeviceMesh) -> torch.optim.Optimizer:
        return steepest.create("muon", params, compile=False, **_COMMON, **options)

    return ShardedCase(label, "steepest", make, options)


def _torch(params: Params, mesh: DeviceMesh) -> torch.optim.Optimizer:
    return torch.optim.Muon([param for _, param in params], **_COMMON, adjust_lr_fn="match_rms_adamw")


def _dion(params: Params, mesh: DeviceMesh) -> torch.optim.Optimizer:
    package = importlib.import_module("dion")
    made: torch.optim.Optimizer = package.Muon(
        [param for _, param in params], distributed_mesh=mesh, **_COMMON, nesterov=True, adjust_lr="rms_norm"
    )
    return made


def cases(*, toy: bool, peers: bool) -> list[ShardedCase]:
    """List what is measured; dion only where it is installed."""
    found = [
        _ours(OWNERS),
        _ours("owners, small buckets", bucket_bytes=_TOY_BUCKET if toy else _SMALL_BUCKET),
        _ours("owners, exchange in bfloat16", exchange_dtype=torch.bfloat16),
        _ours("everywhere", distributed="everywhere"),
        _ours(NARROW_NS, ns_dtype=torch.bfloat16),
    ]
    if peers:
        found.append(ShardedCase("Muon", "torch", _torch))
        if importlib.util.find_spec("dion") is not None:
            found.append(ShardedCase("Muon", "dion", _dion, compiled=True))
    return found


def matrices(*, toy: bool) -> list[ParamShape]:
    """Return the parameters: hidden matrices of GPT-2 blocks, 12 of 9.4 MB in all, or toys."""
    return list(gpt2_blocks(32, 2) if toy else gpt2_blocks(256, 3))


def run_processes(
    world: int, device: torch.device, rounds: int, *, toy: bool, peers: bool, threads: int
) -> list[Row]:
    """Measure in `world` processes.

    Raises:
        RuntimeError: a process failed; the message is its last line of output.
    """
    with tempfile.TemporaryDirectory(prefix="steepest-bench-") as directory:
        request = {
            "world": world,
            "store": str(Path(directory, "store")),
            "device": device.type,
            "rounds": rounds,
            "toy": toy,
            "peers": peers,
            "threads": max(1, threads // world),
        }
        command = [sys.executable, "-W", "ignore", "-m", __name__, json.dumps(request)]
        running = [
            subprocess.Popen(
                [*command, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for rank in range(world)
        ]
        try:
            outputs = [process.communicate(timeout=_TIMEOUT) for process in running]
        finally:
            for process in running:
                process.kill()
    failed = [at for at, process in enumerate(running) if process.returncode != 0]
    if failed:
        lines = outputs[failed[0]][1].strip().splitlines() or [f"status {running[failed[0]].returncode}"]
        raise RuntimeError(f"process {failed[0]} of {world} failed: {lines[-1]}")
    rows: list[Row] = json.loads(outputs[0][0].strip().splitlines()[-1])
    return rows


def main(request: dict[str, Any], rank: int) -> list[Row]:
    """Measure all cases in turns; every process must call this."""
    torch.set_num_threads(request["threads"])
    world, kind = request["world"], request["device"]
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{request['store']}",
        rank=rank,
        world_size=world,
    )
    mesh = init_device_mesh(kind, (world,))
    shapes = matrices(toy=request["toy"])
    rows: list[Row] = []
    steps: dict[str, Callable[[], object]] = {}
    for case in cases(toy=request["toy"], peers=request["peers"]):
        key = f"{case.source}:{case.label}"
        row: Row = {"key": key, "label": case.label, "source": case.source, "processes": world, "reason": ""}
        rows.append(row)
        try:
            step = case.make(_params(shapes, mesh), mesh).step
            for _ in range(_WARMUP_ROUNDS):
                step()
            row |= _observe(step, device, compiled=case.compiled)
        except Exception as error:
            row["reason"] = error_line(error)
            continue
        steps[key] = step
        if case.options is not None:
            row |= _expected(shapes, world, case.options)
    times = _time_together(steps, request["rounds"], device)
    for row in rows:
        key = row["key"]
        if key not in times:
            continue
        row |= {"step_ms": times[key].median_ms, "quartiles_ms": times[key].quartiles}
        for name, label in (("times_owners", OWNERS), ("times_narrow", NARROW_NS)):
            row[name] = times[key].ratio(times[f"steepest:{label}"])
    return rows


def _params(shapes: Sequence[ParamShape], mesh: DeviceMesh) -> Params:
    from torch.distributed.tensor import Shard, distribute_tensor

    generator = torch.Generator().manual_seed(0)
    params = []
    for tensor in shapes:
        param, grad = (
            distribute_tensor(
                torch.randn(tensor.shape, generator=generator).to(mesh.device_type),
                mesh,
                [Shard(0)],
                src_data_rank=None,
            )
            for _ in range(2)
        )
        params.append((tensor.name, nn.Parameter(param)))
        params[-1][1].grad = grad
    return params


def _observe(step: Callable[[], object], device: torch.device, *, compiled: bool) -> Row:
    """Return the collectives, the bytes sent by all-to-alls and the temporary memory of a step."""
    from torch.distributed.tensor.debug import CommDebugMode

    collectives = None
    if not compiled:
        with CommDebugMode() as counting:  # type: ignore[no-untyped-call]
            step()
        collectives = counting.get_total_counts()
    with _counted_bytes() as sent:
        step()
    temporary = profile_step(step, device).temporary_bytes
    totals = torch.tensor([sum(sent), temporary or 0], dtype=torch.int64, device=device)
    most = totals.clone()
    dist.all_reduce(totals)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return {
        "collectives": collectives,
        "sent_bytes": int(totals[0]) // dist.get_world_size() if sent else None,
        "temporary_bytes": int(most[1]),
    }


@contextmanager
def _counted_bytes() -> Iterator[list[int]]:
    """Count what all_to_all_single sends to other processes, where it is given the sizes."""
    sent: list[int] = []
    real = dist.all_to_all_single

    def counting(
        output: torch.Tensor, given: torch.Tensor, there: Any = None, here: Any = None, **options: Any
    ) -> Any:
        if here is not None:
            own = dist.get_rank(options.get("group"))
            size = given.element_size() * (given[0].numel() if given.dim() > 1 else 1)
            sent.append(size * (sum(here) - here[own]))
        return real(output, given, there, here, **options)

    setattr(dist, real.__name__, counting)
    try:
        yield sent
    finally:
        setattr(dist, real.__name__, real)


def _expected(shapes: Sequence[ParamShape], world: int, options: dict[str, Any]) -> Row:
    """Return what the formulas and the plan say."""
    from torch.distributed.tensor import Shard

    named = [(tensor.name, tensor.shape) for tensor in shapes]
    plan = plan_sharded(named, (world,), [Shard(0)], **options)
    nbytes = (
        sum(tensor.numel for tensor in shapes) * (options.get("exchange_dtype") or torch.float32).itemsize
    )
    # Each process sends its share to the owners and its results to the others, less its own part.
    everywhere = options.get("distributed") == "everywhere"
    formula = nbytes * (world - 1) // world if everywhere else 2 * nbytes * (world - 1) // world**2
    return {
        "formula_bytes": formula,
        "waves": plan.work.waves,
        "balance": plan.work.balance,
        "bucket_bytes": options.get("bucket_bytes"),
        "planned_bytes": plan.work.working_bytes,
    }


def _time_together(
    steps: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, Timing]:
    """Take the steps in turns; a step's time is that of the slowest process."""
    # Repeats within a turn depend on the clock, on which processes do not agree: one call each.
    seconds: dict[str, list[float]] = {key: [] for key in steps}
    for number in range(rounds):
        first = number % max(1, len(steps))
        for key in islice(cycle(steps), first, first + len(steps)):
            dist.barrier()
            start = now(device)
            steps[key]()
            seconds[key].append(now(device) - start)
    found = {}
    for key, own in seconds.items():
        table = torch.tensor(own, dtype=torch.float64, device=device)
        dist.all_reduce(table, op=dist.ReduceOp.MAX)
        found[key] = Timing(tuple(1e3 * each for each in table.tolist()))
    return found


if __name__ == "__main__":
    try:
        found = main(json.loads(sys.argv[1]), int(sys.argv[2]))
    except Exception as error:
        sys.exit(error_line(error))
    if sys.argv[2] == "0":
        print(json.dumps(found))
    sys.stdout.flush()
    dist.barrier()
    # gloo's threads and destructors can wait for each other at exit.
    os._exit(0)
