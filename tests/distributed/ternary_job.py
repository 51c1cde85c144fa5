"""Ternary training under fully_shard, for the gloo processes: each votes on its part of a batch."""

from __future__ import annotations

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
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import steepest
from steepest.ternary import BinaryLinear, TernaryLinear, flip_stats

WORLD = 2
MESHES = {"FSDP": (WORLD,), "HSDP": (WORLD, 1)}
CASES: dict[str, dict[str, Any]] = {
    "sign": {"votes": "sign", "threshold": 3, "zero_pull": 0.05},
    "magnitude": {"votes": "magnitude", "threshold": 8, "max_flip_fraction": 0.2},
}
# Which accumulators a rank keeps.
KEEPS = {"all": None, "rows": "rows"}
# Where a checkpoint is saved, and where it is loaded.
MOVES = [
    (("FSDP", "rows"), ("FSDP", "rows")),
    (("FSDP", "rows"), ("HSDP", "all")),
    (("HSDP", "all"), ("FSDP", "rows")),
    (("alone", "all"), ("FSDP", "rows")),
]
WAYS: dict[str, dict[str, Any]] = {"nested": {}, "flat": {"flatten_optimizer_state_dict": True}}


def make(case: str, mesh: str, keeps: str) -> tuple[nn.Module, Any]:
    """The model, sharded unless the mesh is "alone", and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        TernaryLinear(6, 13, scale="tensor"),
        nn.LayerNorm(13),
        nn.GELU(),
        TernaryLinear(13, 7, scale="group", group_size=5),
        nn.LayerNorm(7),
        (TernaryLinear if case == "sign" else BinaryLinear)(7, 1),
    )
    if mesh != "alone":
        names = ("replicate", "shard")[-len(MESHES[mesh]) :]
        on = init_device_mesh("cpu", MESHES[mesh], mesh_dim_names=names)
        # A layer of its own is gathered again in backward.
        for each in (model[3], model):
            fully_shard(each, mesh=on)
    own = {**CASES[case], "distributed": KEEPS[keeps], "process_group": False if mesh == "alone" else None}
    return model, steepest.build(model, "adamw", lr=0.01, nonfinite="skip", ternary=own)


def loss_of(model: nn.Module, index: int) -> torch.Tensor:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(index))
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def train(model: nn.Module, optimizer: Any, steps: range, bad: int | None = None) -> None:
    """The gradient is the mean of all ranks'; in the step ``bad`` the second rank's is not finite."""
    alone = not isinstance(model, FSDPModule)
    for step in steps:
        for rank in range(WORLD) if alone else [dist.get_rank()]:
            loss = loss_of(model, step * WORLD + rank) / (WORLD if alone else 1)
            if step == bad and rank == 1:
                loss = loss * float("nan")
            loss.backward()
        with torch.no_grad():
            # Leaves whole parameters in the place of the root's shards, until they are resharded.
            loss_of(model, 0)
        optimizer.step()
        if isinstance(model, FSDPModule):
            model.reshard()
        optimizer.zero_grad()


def whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def everything(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Parameters, T and state, whole, by name; and the flips so far."""
    found = {name: whole(value) for name, value in model.state_dict().items()}
    for name, param in model.named_parameters():
        for entry, value in optimizer.state[param].items():
            found[f"{name} {entry}"] = whole(value)
    found["flips"] = torch.tensor([each.flips for each in flip_stats(optimizer).layers])
    return found


def state_dicts(model: nn.Module, optimizer: Any, way: str) -> dict[str, Any]:
    options = StateDictOptions(**WAYS[way])
    return {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def save(model: nn.Module, optimizer: Any, path: str, way: str, **how: Any) -> None:
    dcp.save(state_dicts(model, optimizer, way), checkpoint_id=path, **how)


def load(model: nn.Module, optimizer: Any, path: str, way: str, **how: Any) -> None:
    loaded = state_dicts(model, optimizer, way)
    dcp.load(loaded, checkpoint_id=path, **how)
    model.load_state_dict(loaded["model"])
    set_optimizer_state_dict(model, optimizer, loaded["optimizer"], options=StateDictOptions(**WAYS[way]))


def run(folder: str) -> dict[str, Any]:
    done: dict[str, Any] = {}
    for case in CASES:
        for mesh, keeps in [("alone", "all"), *((mesh, keeps) for mesh in MESHES for keeps in KEEPS)]:
            made = make(case, mesh, keeps)
            train(*made, range(2), bad=1)
            for way in WAYS:
                if mesh != "alone":
                    save(*made, f"{folder}/ternary {case} {way} {mesh} {keeps}", way)
                elif dist.get_rank() == 0:
                    save(*made, f"{folder}/ternary {case} {way} {mesh} {keeps}", way, no_dist=True)
            dist.barrier()
            done[f"{case} {mesh} {keeps} bytes"] = made[1].state_bytes()
            done[f"{case} {mesh} {keeps} skipped"] = made[1].skipped_steps
            train(*made, range(2, 5))
            done[f"{case} {mesh} {keeps}"] = everything(*made)
        for way in WAYS:
            for saved, to in MOVES:
                again = make(case, *to)
                load(*again, f"{folder}/ternary {case} {way} {' '.join(saved)}", way)
                train(*again, range(2, 5))
                done[f"{case} {way} {saved} -> {to}"] = everything(*again)
    return done
