"""Real processes that have whole tensors; and torch's count of what sharded ones send."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.mark.parametrize("way", ["ddp", "zero"])
@pytest.mark.parametrize("rule", ["lion", "sgd_sai", "muon", "quad"])
def test_processes_with_whole_tensors_equal_one(rule: str, way: str, processes: list[Any]):
    for done in processes:
        own, alone = (done["replicated"][f"{rule} {each}"] for each in (way, "alone"))
        if rule == "quad":  # products of several matrices may round otherwise than of one
            torch.testing.assert_close(own, alone, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(own, alone)


@pytest.mark.parametrize("rule", ["muon", "quad"])
def test_the_state_dict_of_shared_work_is_whole_on_all_processes(rule: str, processes: list[Any]):
    for done in processes:
        own, alone = done["replicated"][f"{rule} state"], done["replicated"][f"{rule} state alone"]
        assert own.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(own[name], value, rtol=1e-5, atol=1e-6)


def test_a_step_takes_one_agreement_and_two_exchanges(processes: list[Any]):
    for done in processes:
        for counted in done["collectives"].values():
            assert sum(counted.values()) == 3, counted
            assert sorted(counted.values()) == [1, 2]
