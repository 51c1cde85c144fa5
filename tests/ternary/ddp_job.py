"""One worker of several: trains under DistributedDataParallel and saves what it has."""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import steepest

from .models import loss_of, small_model


def main(rank, world, out, kind, rounds, bad):
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
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
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{out}/{rank}.pt")
    dist.barrier()
    # Not through the destructors: gloo's threads and DDP's reducer can wait for each other there.
    os._exit(0)


if __name__ == "__main__":
    rank, world, out, kind, rounds, bad = sys.argv[1:]
    torch.set_num_threads(1)
    main(int(rank), int(world), out, kind, int(rounds), bad == "True")
