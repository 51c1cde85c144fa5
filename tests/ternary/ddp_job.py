"""One rank of several: does every job, under DistributedDataParallel and without, and saves the results."""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import steepest

from . import apart_job
from .models import loss_of, small_model

# By name: the kind of votes, passes a step, whether the second rank's second step is not finite.
JOBS = {
    "sign": ("sign", 1, False),
    "magnitude": ("magnitude", 1, False),
    "several passes, one bad": ("sign", 2, True),
}


def main(rank, world, out):
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    done = {name: train(rank, world, *job) for name, job in JOBS.items()}
    done["apart"] = {fault: apart_job.train(rank, world, fault) for fault in apart_job.FAULTS}
    torch.save(done, f"{out}/{rank}.pt")
    dist.barrier()
    # Not through the destructors: gloo's threads and DDP's reducer can wait for each other there.
    os._exit(0)


def train(rank, world, kind, rounds, bad):
    model = small_model()
    wrapped = DistributedDataParallel(model)
    options = {"threshold": 3, "votes": kind, "zero_pull": 0.02}
    optimizer = steepest.build(model, "sgd", lr=0.01, nonfinite="skip", ternary=options)
    for step in range(4):
        for micro in range(rounds):
            index = (step * rounds + micro) * world + rank
            last = micro == rounds - 1
            with torch.enable_grad() if last else wrapped.no_sync():
                loss = loss_of(wrapped, index) / rounds
                if bad and step == 1 and rank == 1:
                    loss = loss * float("nan")
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
