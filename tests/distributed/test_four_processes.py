"""Four real processes: HSDP, FSDP2 over tensor parallelism, checkpoints between them and to one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from processes import run_processes

from .four_job import CASES, LAYOUTS, STEPS, WORLD, load, make, train, whole


def gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_and_checkpoints(tmp_path: Path):
    """One test, because starting four processes takes seconds."""
    ranks: list[dict[str, Any]] = run_processes("distributed.four_job", WORLD, tmp_path)
    for case in CASES:
        alone = make(case, None)
        train(*alone, range(STEPS))
        for done in ranks:
            for layout in LAYOUTS:
                # Gradients under tensor parallelism are summed in another order than in one process.
                assert gap(done[f"{case} {layout}"], whole(alone[0])) < 2e-5, (case, layout)
            resumed = done[f"{case} FSDP x TP -> FSDP x TP"]
            assert gap(resumed, done[f"{case} FSDP x TP"]) == 0
            for way in ("FSDP x TP -> HSDP", "HSDP -> FSDP"):
                assert gap(done[f"{case} {way}"], whole(alone[0])) < 2e-5, (case, way)
        for layout in LAYOUTS:
            again = make(case, None)
            load(*again, f"{tmp_path}/{case} {layout}", no_dist=True)
            train(*again, range(2, STEPS))
            assert gap(whole(again[0]), whole(alone[0])) < 2e-5, (case, layout)
    for rank, done in enumerate(ranks):
        *said, last = done["failing"]
        if rank == 2:
            assert said == ["ArithmeticError: no"] * 2
        else:
            assert len(said) == 2
            assert all("RuntimeError: rank 2 failed to compute the direction of" in each for each in said)
        assert last == "unchanged True"
