"""One of several gloo processes: does every job and saves what came out."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import steepest


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


JOBS = {"fsdp1": fsdp1}


def main(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    done = {name: job() for name, job in JOBS.items()}
    torch.save(done, f"{folder}/{rank}.pt")
    dist.barrier()
    # gloo's threads and destructors can wait for each other at exit.
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
