"""Real processes: ternary layers under fully_shard equal one process with all of the batch, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .ternary_job import CASES, KEEPS, MESHES, MOVES, WAYS, WORLD, everything, load, make, train


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


@pytest.mark.parametrize("keeps", KEEPS)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_training_equals_one_process(case: str, mesh: str, keeps: str, processes: list[Any]):
    """Scales, biases and norms too: the mean of two gradients is the same in any order."""
    for done in processes:
        expected = done["ternary"][f"{case} alone all"]
        assert expected["flips"].sum() > 0
        assert same(done["ternary"][f"{case} {mesh} {keeps}"], expected)
        # One process's gradient was not finite.
        assert done["ternary"][f"{case} {mesh} {keeps} skipped"] == 1


@pytest.mark.parametrize("case", CASES)
def test_by_rows_each_rank_keeps_its_share(case: str, processes: list[Any]):
    # Of 13, 7 and 1 rows the first rank has 7, 4 and 1.
    shares = [7 * 6 + 4 * 13 + 7, 6 * 6 + 3 * 13]
    for rank, done in enumerate(processes):
        keeps = [done["ternary"][f"{case} FSDP {each} bytes"] for each in ("all", "rows")]
        assert keeps[0] - keeps[1] == sum(shares) - shares[rank]
    assert len(shares) == WORLD


@pytest.mark.parametrize(("saved", "to"), MOVES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_what_was_saved_goes_on_elsewhere(case: str, way: str, saved: Any, to: Any, processes: list[Any]):
    for done in processes:
        assert same(done["ternary"][f"{case} {way} {saved} -> {to}"], done["ternary"][f"{case} alone all"])


@pytest.mark.parametrize("keeps", KEEPS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_ranks_saved_goes_on_in_one_process(
    case: str, way: str, keeps: str, processes: list[Any], folder: Path
):
    # An optimizer that would divide rows does so once there are several processes.
    model, optimizer = make(case, "alone", keeps)
    load(model, optimizer, f"{folder}/ternary {case} {way} FSDP {keeps}", way, no_dist=True)
    train(model, optimizer, range(2, 5))
    assert same(everything(model, optimizer), processes[0]["ternary"][f"{case} alone all"])
