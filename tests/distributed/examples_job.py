"""One of two gloo processes: runs the examples and saves what they return."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

EXAMPLES = Path(__file__).parents[2] / "examples"


def main(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    fsdp2 = runpy.run_path(str(EXAMPLES / "fsdp2.py"))["main"]
    done: dict[str, Any] = {
        "unbroken": fsdp2(f"{folder}/unbroken", 12),
        "begun": fsdp2(f"{folder}/resumed", 8),
        "resumed": fsdp2(f"{folder}/resumed", 4),
        "tensor parallel": runpy.run_path(str(EXAMPLES / "tensor_parallel.py"))["main"](40),
    }
    torch.save(done, f"{folder}/{rank}.pt")
    dist.barrier()
    # gloo's threads and destructors can wait for each other at exit.
    os._exit(0)
