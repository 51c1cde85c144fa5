"""One of several gloo processes: does every job and saves what came out."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import steepest

from . import ternary_job


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def inputs(step: int) -> torch.Tensor:
    """A batch that all processes see alike, so that the mean of their gradients is each one's."""
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))


def wrapped(original: bool) -> nn.Module:
    return FullyShardedDataParallel(small_model(), use_orig_params=original, device_id=torch.device("cpu"))


def message(act: Any) -> str:
    try:
        act()
    except (ValueError, RuntimeError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def step_of(model: nn.Module, optimizer: Any, step: int = 0) -> None:
    optimizer.zero_grad()
    model(inputs(step)).square().mean().backward()
    optimizer.step()


def fsdp1() -> dict[str, Any]:
    done: dict[str, Any] = {}
    for original in (False, True):
        for rule in ("sgd_sai", "simba_leaky", "muon"):
            model = wrapped(original)
            done[f"{rule} {original}"] = message(lambda m=model, r=rule: steepest.create(r, m.parameters()))
        model = wrapped(original)
        optimizer = steepest.SignGSD(model.parameters(), lr=0.5)
        step_of(model, optimizer)
        with FullyShardedDataParallel.summon_full_params(model):
            done[f"element {original}"] = torch.cat([p.detach().flatten() for p in model.parameters()])
    # Flattened in place, after the optimizer was made.
    model = small_model()
    optimizer = steepest.SGDSaI(model.named_parameters())
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    done["afterwards"] = message(lambda: step_of(model, optimizer))
    done["afterwards, state"] = len(optimizer.state)
    return done


# -- FSDP2

WORLD = 2
RULES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "adamw": ("adamw", torch.bfloat16, {"rounding": "stochastic", "nonfinite": "skip", "seed": 5}),
    "simba": ("simba", torch.float32, {}),
    "sgd_sai": ("sgd_sai", torch.float32, {"warmup_batches": 3}),
    # Its dense factors exist on the owners only.
    "quad": ("quad", torch.float32, {}),
}
MESHES = {"FSDP": (WORLD,), "HSDP": (WORLD, 1)}
# On which mesh a checkpoint is saved, and on which it is loaded.
MOVES = [("FSDP", "FSDP"), ("FSDP", "HSDP"), ("HSDP", "FSDP"), ("alone", "FSDP")]
# Whose state goes by way of whole tensors on one process: int16 counters cannot.
FULL = ["adamw", "quad"]
WAYS = {"nested": {}, "flat": {"flatten_optimizer_state_dict": True}}
# Every rule takes every move, and every move is taken either way: the way is torch's, and knows no meshes.
LOADS = [
    (case, [*WAYS][(row + column) % 2], *move)
    for row, case in enumerate(RULES)
    for column, move in enumerate(MOVES)
]


def make(case: str, mesh: str | None, **own: Any) -> tuple[nn.Module, Any]:
    """The model, sharded over a mesh or not, and its optimizer."""
    name, dtype, options = RULES[case]
    model = small_model().to(dtype)
    if mesh is not None:
        names = ("replicate", "shard")[-len(MESHES[mesh]) :]
        fully_shard(model, mesh=init_device_mesh("cpu", MESHES[mesh], mesh_dim_names=names))
    options = {"lr": 0.05, "weight_decay": 0.1, **options, **own}
    return model, steepest.create(name, model.named_parameters(), **options)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        optimizer.zero_grad()
        model(inputs(step).to(dtype)).square().mean().backward()
        optimizer.step()


def whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def everything(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Parameters and state, whole, by name. Not by full_tensor(), which gloo refuses for int16."""
    found = {}
    states = optimizer.state_dict()["state"]
    for number, (name, param) in enumerate(model.named_parameters()):
        found[name] = whole(param)
        for entry, value in states[number].items():
            sent = value.to(torch.int32) if value.dtype == torch.int16 else value
            found[f"{name} {entry}"] = whole(sent).to(value.dtype)
    return found


def options_of(way: str) -> StateDictOptions:
    return StateDictOptions(**WAYS[way])


def save(model: nn.Module, optimizer: Any, path: str, way: str, **how: Any) -> None:
    state = get_optimizer_state_dict(model, optimizer, options=options_of(way))
    dcp.save({"model": model.state_dict(), "optimizer": state}, checkpoint_id=path, **how)


def load(model: nn.Module, optimizer: Any, path: str, way: str, **how: Any) -> None:
    state = get_optimizer_state_dict(model, optimizer, options=options_of(way))
    loaded = {"model": model.state_dict(), "optimizer": state}
    dcp.load(loaded, checkpoint_id=path, **how)
    model.load_state_dict(loaded["model"])
    set_optimizer_state_dict(model, optimizer, loaded["optimizer"], options=options_of(way))


def fsdp2(folder: str) -> dict[str, Any]:
    done: dict[str, Any] = {}
    for case in RULES:
        alone = make(case, None)
        train(*alone, range(2))
        for way in WAYS:
            if dist.get_rank() == 0:
                save(*alone, f"{folder}/{case} {way} alone", way, no_dist=True)
        dist.barrier()
        train(*alone, range(2, 4))
        done[f"{case} alone"] = everything(*alone)
        for mesh in MESHES:
            sharded = make(case, mesh)
            train(*sharded, range(2))
            for way in WAYS:
                save(*sharded, f"{folder}/{case} {way} {mesh}", way)
            train(*sharded, range(2, 4))
            done[f"{case} {mesh}"] = everything(*sharded)
    for case, way, saved, mesh in LOADS:
        again = make(case, mesh)
        load(*again, f"{folder}/{case} {way} {saved}", way)
        train(*again, range(2, 4))
        done[f"{case} {way} {saved} -> {mesh}"] = everything(*again)
    return done | full_state()


def full_state() -> dict[str, Any]:
    """Whole tensors on one process, and back from it."""
    done: dict[str, Any] = {}
    for case in FULL:
        model, optimizer = make(case, "FSDP")
        train(model, optimizer, range(2))
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(model, optimizer, options=options)
        optimizer.zero_grad()  # torch makes no state where there are gradients
        name, _, own = RULES[case]
        again = steepest.create(name, model.named_parameters(), lr=0.05, weight_decay=0.1, **own)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(model, again, state, options=options)
        train(model, again, range(2, 4))
        done[f"{case} full"] = everything(model, again)
    return done


# -- optimizer in backward


RELEASED = ["adamw", "simba"]  # element rules


def released() -> dict[str, Any]:
    """Steps within backward, and ordinary ones from the same start."""
    done: dict[str, Any] = {}
    for case in RELEASED:
        for mesh in MESHES:
            model, optimizer = make(case, mesh, nonfinite="ignore")
            handle = steepest.release_gradients(model, optimizer)
            dtype = next(model.parameters()).dtype
            freed = True
            for step in range(3):
                with handle.accumulate():
                    model(inputs(100 + step).to(dtype)).square().mean().backward()
                model(inputs(step).to(dtype)).square().mean().backward()
                freed &= all(param.grad is None for param in model.parameters())
                optimizer.step()
            done[f"{case} {mesh}"] = everything(model, optimizer)
            done[f"{case} {mesh}, freed"] = freed
            model, optimizer = make(case, mesh, nonfinite="ignore")
            for step in range(3):
                for at in (100 + step, step):
                    model(inputs(at).to(dtype)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            done[f"{case} {mesh}, ordinary"] = everything(model, optimizer)
    return done


# -- whole tensors on all processes


def replicated() -> dict[str, Any]:
    """DistributedDataParallel whose processes share the work, ZeRO-1, and one process that does all."""
    done: dict[str, Any] = {}
    for rule in ("lion", "sgd_sai", "muon", "quad"):
        for way in ("alone", "ddp", "zero"):
            torch.manual_seed(0)
            model: nn.Module = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3)))
            options = {"lr": 0.05, **({"method": "svd"} if rule == "muon" else {})}
            if way == "zero":
                kind = type(steepest.create(rule, model.parameters()))
                optimizer: Any = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=kind, **options)
            else:
                if way == "ddp":
                    model = nn.parallel.DistributedDataParallel(model)
                    options |= {"distributed": "owners"} if rule in ("muon", "quad") else {}
                optimizer = steepest.create(rule, model.named_parameters(), **options)
            train(model, optimizer, range(3))
            done[f"{rule} {way}"] = torch.stack([param.detach().clone() for param in model.parameters()])
            if way == "ddp":
                saved = optimizer.state_dict()["state"]
                done[f"{rule} state"] = {f"{at} {n}": v for at, s in saved.items() for n, v in s.items()}
            elif way == "alone":
                state = optimizer.state_dict()["state"]
                done[f"{rule} state alone"] = {
                    f"{at} {n}": v for at, s in state.items() for n, v in s.items()
                }
    return done


def collectives() -> dict[str, Any]:
    """What a step of Muon sends under FSDP2, counted by torch."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    optimizer = steepest.Muon(model.named_parameters())
    done = {}
    for step in range(2):
        model(torch.ones(1, 8)).sum().backward()
        with CommDebugMode() as counted:
            optimizer.step()
        done[str(step)] = {str(name): count for name, count in counted.get_comm_counts().items()}
    return done


# -- what can go wrong


def shard(value: float = 1.0) -> nn.Parameter:
    """A sharded parameter with ones for a gradient."""
    mesh = init_device_mesh("cpu", (WORLD,))
    whole = torch.full((4, 2), value)
    param = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None))
    param.grad = torch.ones_like(param)
    return param


FAULTS = ["missing", "none", "order", "number", "lr", "option", "rule", "skip", "raise"]


def faulty(fault: str) -> dict[str, Any]:
    """What a step says and does if something is wrong with one process."""
    bad = dist.get_rank() == 1
    named = [(name, shard()) for name in "ab"]
    params = dict(named)
    if bad and fault == "order":
        named.reverse()
    if bad and fault == "number":
        named.pop()
    options: dict[str, Any] = {"lr": 0.5, "nonfinite": "raise" if fault == "raise" else "skip"}
    rule = "signum" if bad and fault == "rule" else "lion"
    optimizer = steepest.create(rule, named, weight_decay=0.0, **options)
    group = optimizer.param_groups[0]
    if bad:
        group.update({"lr": {"lr": 0.25}, "option": {"maximize": True}}.get(fault, {}))
        if fault == "missing":
            params["b"].grad = None
        elif fault in ("skip", "raise"):
            params["b"].grad.to_local()[0, 0] = float("nan")
    if fault == "none":
        optimizer.zero_grad()
    said = message(optimizer.step)
    return {
        "said": said,
        "untouched": all(param.detach().to_local().eq(1).all() for param in params.values()),
        "states": sum(map(bool, optimizer.state.values())),
        "skipped": optimizer.skipped_steps,
    }


def failures() -> dict[str, Any]:
    return {fault: faulty(fault) for fault in FAULTS} | {"replaced": replaced()}


def replaced() -> list[Any]:
    """Parameters put in place of others, without state and then with state of another layout."""
    old, new = shard(), shard()
    optimizer = steepest.Lion([("w", old)], lr=0.5, weight_decay=0.0, nonfinite="skip")
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = new
    said = [message(optimizer.step)]
    mesh = new.device_mesh
    again = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(1)], src_data_rank=None))
    again.grad = torch.ones_like(again)
    optimizer.param_groups[0]["params"][0] = again
    optimizer.state[again] = optimizer.state.pop(new)
    said.append(message(optimizer.step))
    return [*said, new.detach().to_local(), again.detach().to_local()]


def lost(folder: str) -> dict[str, Any]:
    """Steps after process groups were destroyed and made anew, and after the other process has ended."""
    rank, param = dist.get_rank(), shard()
    optimizer = steepest.Lion([("w", param)], lr=0.125, weight_decay=0.0, nonfinite="skip")
    said = [message(optimizer.step)]
    dist.destroy_process_group()
    said.append(message(optimizer.step))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/anew",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=20),
    )
    said.append(message(optimizer.step))
    if rank == 0:
        # The other process ends now.
        said.append(message(optimizer.step))
    return {"said": said, "param": param.detach().to_local()}


JOBS = {
    "fsdp1": lambda _: fsdp1(),
    "fsdp2": fsdp2,
    "failures": lambda _: failures(),
    "released": lambda _: released(),
    "replicated": lambda _: replicated(),
    "collectives": lambda _: collectives(),
    "ternary": ternary_job.run,
}


def main(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    done = {name: job(folder) for name, job in JOBS.items()}
    done["lost"] = lost(folder)
    torch.save(done, f"{folder}/{rank}.pt")
    # gloo's threads and destructors can wait for each other at exit.
    os._exit(0)
