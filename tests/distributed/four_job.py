"""One of four gloo processes: FSDP2 over tensor parallelism, HSDP, and checkpoints between them."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import steepest

WORLD = 4
CASES = ["muon", "quad"]
LAYOUTS = ["FSDP", "HSDP", "FSDP x TP"]
STEPS = 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(10)
        # Rows that four processes do not divide.
        self.up, self.down = nn.Linear(10, 12), nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def make(case: str, layout: str | None) -> tuple[nn.Module, Any]:
    model = Model()
    if layout == "FSDP":
        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    elif layout == "HSDP":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    elif layout == "FSDP x TP":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
    options = {"ns_dtype": torch.float32} if case == "muon" else {}
    matrices = ["up.weight", "down.weight"]
    named = dict(model.named_parameters())
    groups = [
        {"params": [(name, named[name]) for name in matrices], "rule": case, **options},
        {"params": [(n, p) for n, p in named.items() if n not in matrices], "rule": "adamw"},
    ]
    return model, steepest.Optimizer(groups, rule=case, lr=0.02, nonfinite="skip")


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        # All processes see one batch, so that the mean of their gradients is each one's.
        model(torch.randn(8, 10, generator=generator)).square().mean().backward()
        optimizer.step()


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def save(model: nn.Module, optimizer: Any, path: str) -> None:
    models, optimizers = get_state_dict(model, optimizer)
    dcp.save({"model": models, "optimizer": optimizers}, checkpoint_id=path)


def load(model: nn.Module, optimizer: Any, path: str, **how: Any) -> None:
    models, optimizers = get_state_dict(model, optimizer)
    loaded = {"model": models, "optimizer": optimizers}
    dcp.load(loaded, checkpoint_id=path, **how)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])


class Fails(steepest.OrthogonalizedOptimizer):
    """Fails on one process."""

    def orthogonalize(self, p: Any, grad: torch.Tensor, **options: Any) -> torch.Tensor:
        if dist.get_rank() == 2:
            raise ArithmeticError("no")
        return grad.sign()


def failing() -> list[str]:
    """A user's function raises on one process, and computing fails there: nobody waits for anybody."""
    said = []
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(WORLD)))
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    optimizer: Any = Fails(model.named_parameters(), lr=0.1)
    before = whole(model)
    for _ in range(2):
        model(torch.ones(1, 8)).sum().backward()
        try:
            optimizer.step()
        except (ArithmeticError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    unchanged = all(torch.equal(value, before[name]) for name, value in whole(model).items())
    return [*said, f"unchanged {unchanged}"]


def run(folder: str) -> dict[str, Any]:
    done: dict[str, Any] = {"failing": failing()}
    for case in CASES:
        for layout in LAYOUTS:
            model, optimizer = make(case, layout)
            train(model, optimizer, range(2))
            save(model, optimizer, f"{folder}/{case} {layout}")
            train(model, optimizer, range(2, STEPS))
            done[f"{case} {layout}"] = whole(model)
        for saved, layout in (("FSDP x TP", "FSDP x TP"), ("FSDP x TP", "HSDP"), ("HSDP", "FSDP")):
            model, optimizer = make(case, layout)
            load(model, optimizer, f"{folder}/{case} {saved}")
            train(model, optimizer, range(2, STEPS))
            done[f"{case} {saved} -> {layout}"] = whole(model)
    return done


def main(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(run(folder), f"{folder}/{rank}.pt")
    # gloo's threads and destructors can wait for each other at exit.
    dist.barrier()
    os._exit(0)
