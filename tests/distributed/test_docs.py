"""What docs/sharding.md shows runs."""

import torch
import torch.distributed as dist

import steepest
from pages import run_python


def test_its_example_runs(tmp_path, capsys):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        run_python("docs/sharding.md", {"torch": torch, "steepest": steepest})
    finally:
        dist.destroy_process_group()
    elements = 64 * 256 + 256 + 256 * 10 + 10
    # Muon holds a momentum of the hidden matrix, AdamW two moments and a step of each other tensor.
    assert capsys.readouterr().out.split() == [str(8 * elements - 4 * 64 * 256 + 8 * 3)]
