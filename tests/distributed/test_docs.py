"""What docs/sharding.md shows runs."""

import re
from pathlib import Path

import torch
import torch.distributed as dist

import steepest

TEXT = (Path(__file__).parents[2] / "docs" / "sharding.md").read_text(encoding="utf-8")


def test_its_example_runs(tmp_path, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        exec(compile(block, "docs/sharding.md", "exec"), {"torch": torch, "steepest": steepest})
    finally:
        dist.destroy_process_group()
    elements = 64 * 256 + 256 + 256 * 10 + 10
    # Muon holds a momentum of the hidden matrix, AdamW two moments and a step of each other tensor.
    assert capsys.readouterr().out.split() == [str(8 * elements - 4 * 64 * 256 + 8 * 3)]
