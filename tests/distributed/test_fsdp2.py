"""Real processes: training and checkpoints under fully_shard equal one process, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .gloo_job import FULL, LOADS, MESHES, RULES, WAYS, everything, load, make, train


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", RULES)
def test_training_equals_one_process(case: str, mesh: str, processes: list[Any]):
    for done in processes:
        assert same(done["fsdp2"][f"{case} {mesh}"], done["fsdp2"][f"{case} alone"])


@pytest.mark.parametrize(("case", "way", "saved", "mesh"), LOADS)
def test_what_one_mesh_saved_goes_on_on_another(
    case: str, way: str, saved: str, mesh: str, processes: list[Any]
):
    for done in processes:
        assert same(done["fsdp2"][f"{case} {way} {saved} -> {mesh}"], done["fsdp2"][f"{case} alone"])


@pytest.mark.parametrize("saved", MESHES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", RULES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_a_mesh_saved_goes_on_in_one_process(
    case: str, way: str, saved: str, processes: list[Any], folder: Path
):
    model, optimizer = make(case, None)
    load(model, optimizer, f"{folder}/{case} {way} {saved}", way, no_dist=True)
    train(model, optimizer, range(2, 4))
    assert same(everything(model, optimizer), processes[0]["fsdp2"][f"{case} alone"])


@pytest.mark.parametrize("case", FULL)
def test_full_state_that_is_broadcast_from_one_rank(case: str, processes: list[Any]):
    for done in processes:
        assert same(done["fsdp2"][f"{case} full"], done["fsdp2"][f"{case} alone"])
